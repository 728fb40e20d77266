"""COCO instances files as a data set: compact arrays, contiguous labels and the way back.

The JSON is decoded straight into a few arrays, 41 bytes an annotation and no Python object, so that a process
of COCO's size stays small and DataLoader workers share one copy. Segmentations are skipped unless masks are asked
for; they are then kept as they are, and become pixels when their image is loaded.
"""

from __future__ import annotations

import itertools
import mmap
import os
import posixpath
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, Protocol, TypeAlias

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnest_det.coco_format import syntax_error
from resnest_det.data.coco_masks import Mistake, Segmentation, SegmentationReader, Segmentations
from resnest_det.data.files import (
    ImageFiles,
    IncompleteDataError,
    UnreadableImageError,
    channels_first,
    describe_near,
    listed,
    offsets_of,
    read_rgb,
)
from resnest_det.data.mixing import MIN_BOX_SIDE, AnnotatedImage, CopyPaste, Mosaic

Target: TypeAlias = dict[str, Any]
Sample: TypeAlias = tuple[Tensor, Target]

_NUM_SHOWN = 5  # how many broken annotations a message shows
_CHUNK = 256  # annotations decoded before they are moved into the arrays: a processor's cache holds their numbers
_MAX_COORDINATE = 1e9  # pixels; far above any image, far below what float32 overflows at
_MIN_INT64, _MAX_INT64 = -(2**63), 2**63 - 1


class Transform(Protocol):
    """What `CocoDetection` calls on every sample it loads, e.g. `augment.DetectionAugmentation`."""

    def __call__(
        self,
        image: NDArray[np.uint8],
        boxes_xyxy: NDArray[np.float32],
        masks: NDArray[np.uint8] | None,
        seed: int | None,
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8] | None, NDArray[np.int64]]:
        """Transform one image and what is on it.

        Args:
            image: RGB, (H, W, 3).
            boxes_xyxy: (N, 4) in pixels.
            masks: (N, H, W) of 0 and 1, or None where the data set reads no masks.
            seed: decides everything random; None draws afresh.

        Returns:
            The image (H', W', 3), its boxes (M, 4), their masks (M, H', W') or None, and which of the N given
            boxes these are (M,).
        """
        ...


class CocoDetection(ImageFiles[Sample]):
    """Images, boxes and masks of a COCO instances file.

    `dataset[i]` is `(image, target)`: the image a uint8 RGB tensor (3, H, W), the target a dict of
    `boxes` float32 (N, 4) xyxy in pixels, `labels` int64 (N,) in 1..K, `image_id` int, `area` float64 (N,),
    the annotations' own areas in pixels of the original image, of mixed images in pixels of the result, and
    `iscrowd` bool (N,); with `masks=True` also `masks` uint8 (N, H, W) of 0 and 1, pycocotools' to the last pixel. With
    `masks="rle"` they stay run lengths, a list of pycocotools' {"size": [height, width], "counts": bytes}: a thousandth
    of the memory, for evaluation.

    With `train=True`, crowd regions are left out, boxes are clipped to their image, and those then less than
    1 px wide or high are dropped with a warning. An image that had annotations and lost them all is left out
    too: it shows objects, so it is no true negative. With `train=False`, the ground truth is the
    file's, nothing clipped and nothing dropped, so that an evaluation equals pycocotools'.

    With `train=True` and `masks=True`, a box whose mask has no pixel is dropped when its image is loaded, be it a
    polygon too thin for one or a mask that the transform cut away. Mosaic comes before the transform, copy-paste
    after it. What they draw, the other images too, depends on the seed of `load` alone; another image that cannot
    be read is passed over for the next of the data set with on_unreadable="skip".

    Args:
        images: folder that the file names of the JSON are relative to.
        annotations: the JSON file; needs the keys images, annotations and categories. `area` and `iscrowd`
            of an annotation may be absent (width x height and 0), unknown keys are ignored.
        train: ground truth for training (True) or for evaluation (False).
        transform: applied to every sample, e.g. `augment.DetectionAugmentation`.
        keep_empty: in training, keep images without annotations, as negatives.
        on_unreadable: what `load` does with an image that cannot be decoded: "raise", or "skip" (returns
            None, warns once a file and lists the file in `skipped`).
        masks: give the objects' masks, True: as pixels, "rle": as run lengths, which takes train=False and no
            transform. Every annotation must then have a segmentation.
        mosaic: puts training images together from four.
        copy_paste: pastes objects of another training image, along their masks: every annotation must have a
            segmentation, whether masks are given or not.

    Attributes:
        class_names: label -> category name.
        category_ids: label -> the file's category id.
        labels: the file's category id -> label. Labels are 1..K by rising category id; 0 is background.
        num_classes: K + 1, as torchvision's detectors count.
        image_ids: the file's image ids, int64 (num_images,).
        aspect_ratios: width / height, float32 (num_images,).

    Raises:
        FileNotFoundError: the folder or the file is missing, or images that the file names.
        ValueError: the file is no valid COCO instances file; the message lists every kind of mistake. Or images
            would be mixed without train=True, or masks="rle" is given with train=True or a transform.
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        annotations: str | os.PathLike[str],
        *,
        train: bool = False,
        transform: Transform | None = None,
        keep_empty: bool = True,
        on_unreadable: Literal["raise", "skip"] = "raise",
        masks: bool | Literal["rle"] = False,
        mosaic: Mosaic | None = None,
        copy_paste: CopyPaste | None = None,
    ) -> None:
        if not train and not keep_empty:
            warnings.warn("keep_empty=False has no effect with train=False: evaluation uses every image", stacklevel=2)
        _check_mixing(train, mosaic, copy_paste)
        _check_masks(masks, train, transform)
        folder, self._file = Path(images), Path(annotations)
        _check_folder_exists(folder)
        content = _read(self._file, bool(masks) or copy_paste is not None)
        _check_images_exist(folder, content.file_names)
        self._train, self._transform, self._masks = train, transform, masks
        self._mosaic, self._copy_paste = mosaic, copy_paste

        self.class_names, self.category_ids, self.labels = _labels_of(content)
        self.num_classes = len(self.labels) + 1

        selection = _select_for_training(content, keep_empty) if train else _select_all(content)
        if not len(selection.images):
            raise ValueError(
                f"{self._file}: none of its {len(content.image_ids)} images is left for training; "
                f"it needs annotations that are neither crowd regions nor degenerate, or keep_empty=True"
            )
        self._summary = _summarise(self._file, content, selection)
        super().__init__(folder, [content.file_names[i] for i in selection.images], on_unreadable)
        self._store(content, selection)

    def _store(self, content: _Content, selection: _Selection) -> None:
        """Keep the selected images and annotations, as tensors: only those stay shared under spawn."""
        sizes = content.sizes[selection.images]
        # Annotations ordered by image; the sort is stable, so within an image the file's order is kept.
        place = np.full(len(content.image_ids), -1)
        place[selection.images] = np.arange(len(selection.images))
        place = place[content.image_indices[selection.annotations]]
        order = np.argsort(place, kind="stable")
        chosen = selection.annotations[order]

        self.image_ids = torch.from_numpy(content.image_ids[selection.images])
        self.aspect_ratios = torch.from_numpy((sizes[:, 0] / sizes[:, 1]).astype(np.float32))
        self._sizes = torch.from_numpy(sizes)  # (num_images, 2): width, height
        self._offsets = torch.from_numpy(offsets_of(np.bincount(place, minlength=len(selection.images))))
        self._boxes = torch.from_numpy(selection.boxes_xyxy[order])
        self._labels = torch.from_numpy(_labels_in_order(content.category_ids[chosen], self.labels))
        self._areas = torch.from_numpy(content.areas[chosen])
        self._iscrowd = torch.from_numpy(content.iscrowd[chosen])
        self._annotation_ids = torch.from_numpy(content.annotation_ids[chosen])
        self._segmentations = None if content.segmentations is None else content.segmentations.select(chosen)

    def _load(self, index: int, seed: int | None) -> Sample:
        sample = self._augmented(index, seed)
        if self._copy_paste is not None:
            generator = _generator(seed, 1)
            if generator.random() < self._copy_paste.probability:
                place, other_seed = (int(generator.integers(end)) for end in (len(self), _MAX_INT64))
                other = self._first_readable(place, lambda place: self._augmented(place, other_seed))
                sample = self._copy_paste(sample, other, generator)
        target = {
            "boxes": torch.from_numpy(sample.boxes_xyxy),
            "labels": torch.from_numpy(sample.labels),
            "image_id": int(self.image_ids[index]),
            "area": torch.from_numpy(sample.areas),
            "iscrowd": torch.from_numpy(sample.iscrowd),
        }
        if self._masks == "rle":
            assert self._segmentations is not None
            target["masks"] = self._segmentations.encoded(*self._span(self._offsets, index), *sample.image.shape[:2])
        elif self._masks:
            target["masks"] = torch.from_numpy(sample.masks)
        return channels_first(sample.image), target

    def _augmented(self, index: int, seed: int | None) -> AnnotatedImage:
        """The image at `index`, or a mosaic that begins with it, transformed."""
        sample = self._annotated(index)
        if self._mosaic is not None:
            generator = _generator(seed, 0)
            if generator.random() < self._mosaic.probability:
                places = generator.integers(len(self), size=3).tolist()
                others = [self._first_readable(place, self._annotated) for place in places]
                sample = self._mosaic([sample, *others], generator)
        if self._transform is not None:
            image, boxes, masks, kept = self._transform(sample.image, sample.boxes_xyxy, sample.masks, seed)
            labels, areas, iscrowd = sample.labels[kept], sample.areas[kept], sample.iscrowd[kept]
            sample = AnnotatedImage(image, boxes, labels, areas, iscrowd, masks)
        if self._train and sample.masks is not None:
            sample = sample.keep(np.any(sample.masks, axis=(1, 2)))
        return sample

    def _annotated(self, index: int) -> AnnotatedImage:
        """The image at `index` and its objects as the file has them, all of it copies."""
        path, (width, height) = self.image_path(index), self._sizes[index].tolist()
        image = read_rgb(path, width, height)
        if image.shape[:2] != (height, width):
            raise ValueError(
                f"{path} is {image.shape[1]} x {image.shape[0]} pixels, but the annotation file says {width} x "
                f"{height}; the boxes belong to another version of this image"
            )
        first, last = self._span(self._offsets, index)
        masks = None
        if self._segmentations is not None and self._masks != "rle":
            masks = self._segmentations.rasterise(first, last, height, width)
        return AnnotatedImage(
            image,
            self._boxes[first:last].numpy().copy(),
            self._labels[first:last].numpy().copy(),
            self._areas[first:last].numpy().copy(),
            self._iscrowd[first:last].numpy().copy(),
            masks,
        )

    def _first_readable(self, place: int, read: Callable[[int], AnnotatedImage]) -> AnnotatedImage:
        """What `read` makes of the image at `place`, or of the next one that can be read, in a circle.

        Raises:
            ValueError: none can be read, as when the folder is gone.
        """
        for step in range(len(self)):
            index = (place + step) % len(self)
            try:
                return read(index)
            except UnreadableImageError as error:
                self._pass_over(index, error)
        raise ValueError(f"none of the {len(self)} images can be read, such as {self.image_path(place)}")

    def annotation_ids(self, index: int) -> Tensor:
        """The file's ids of the image's annotations, int64 (N,), in the order of the untransformed boxes."""
        first, last = self._span(self._offsets, index)
        return self._annotation_ids[first:last].clone()

    def label_lists(self) -> tuple[Tensor, Tensor]:
        """The labels of all images, without reading any.

        Returns:
            Offsets int64 (num_images + 1,) and labels int64 (num_boxes,): those of image i are
            `labels[offsets[i] : offsets[i + 1]]`, in the order of the untransformed boxes.
        """
        return self._offsets.clone(), self._labels.clone()

    @property
    def annotation_file(self) -> Path:
        """The JSON file that the data set was read from."""
        return self._file

    def summary(self) -> str:
        """One paragraph on what the file holds and what was left out of it."""
        return self._summary


class CocoTargets(NamedTuple):
    """The ground truth of an annotation file, for evaluation without its images."""

    class_names: dict[int, str]  # label -> category name
    category_ids: dict[int, int]  # label -> the file's category id
    labels: dict[int, int]  # the file's category id -> label
    targets: list[Target]  # one an image, in the file's order


def read_coco_targets(annotations: str | os.PathLike[str], *, masks: bool = False) -> CocoTargets:
    """The ground truth of a COCO instances file, whose images are not looked for.

    Args:
        annotations: the JSON file, as `CocoDetection` takes it.
        masks: give the objects' masks, as run lengths. Every annotation must then have a segmentation.

    Returns:
        Targets as `CocoDetection` gives them with train=False and masks="rle", but with boxes in float64, and
        beside them "boxes_xywh" (N, 4), the file's own numbers: for an evaluation that equals pycocotools'.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is no valid COCO instances file; the message lists every kind of mistake.
    """
    content = _read(Path(annotations), masks)
    class_names, category_ids, labels = _labels_of(content)
    order = np.argsort(content.image_indices, kind="stable")
    offsets = offsets_of(np.bincount(content.image_indices, minlength=len(content.image_ids))).tolist()
    segmentations = None if content.segmentations is None else content.segmentations.select(order)
    boxes_xywh = torch.from_numpy(content.boxes_xywh[order])
    boxes_xyxy = torch.from_numpy(_to_xyxy(boxes_xywh.numpy()))
    object_labels = torch.from_numpy(_labels_in_order(content.category_ids[order], labels))
    areas, iscrowd = torch.from_numpy(content.areas[order]), torch.from_numpy(content.iscrowd[order])
    targets = []
    for index, (first, last) in enumerate(itertools.pairwise(offsets)):
        target: Target = {
            "boxes": boxes_xyxy[first:last],
            "boxes_xywh": boxes_xywh[first:last],
            "labels": object_labels[first:last],
            "image_id": int(content.image_ids[index]),
            "area": areas[first:last],
            "iscrowd": iscrowd[first:last],
        }
        if segmentations is not None:
            width, height = content.sizes[index].tolist()
            target["masks"] = segmentations.encoded(first, last, height, width)
        targets.append(target)
    return CocoTargets(class_names, category_ids, labels, targets)


# What the JSON holds. Only the named fields are built; msgspec skips the rest without making objects.
_Id: TypeAlias = Annotated[int, msgspec.Meta(ge=_MIN_INT64, le=_MAX_INT64)]


class _Image(msgspec.Struct, gc=False):
    id: _Id
    file_name: str
    width: Annotated[int, msgspec.Meta(le=2**31 - 1)]
    height: Annotated[int, msgspec.Meta(le=2**31 - 1)]


class _Annotation(msgspec.Struct, gc=False):
    id: _Id
    image_id: _Id
    category_id: _Id
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: int | bool = 0


class _UndecodedAnnotation(_Annotation, gc=False):
    segmentation: msgspec.Raw = msgspec.Raw(b"null")


class _SegmentedAnnotation(_Annotation, gc=False):
    segmentation: Segmentation = None


class _Category(msgspec.Struct):
    id: _Id
    name: str


class _Document(msgspec.Struct):
    images: list[_Image]
    # Undecoded at first: slices of the mapped file cost 60 bytes each, decoded objects 300.
    annotations: list[msgspec.Raw]
    categories: list[_Category]


class _Content(NamedTuple):
    """A COCO file's content in arrays, everything in the file's order."""

    image_ids: NDArray[np.int64]  # (I,)
    sizes: NDArray[np.int64]  # (I, 2): width, height
    file_names: list[str]  # (I,)
    categories: dict[int, str]  # id -> name
    all_category_ids: NDArray[np.int64]  # (C,): with duplicates
    annotation_ids: NDArray[np.int64]  # (A,)
    image_indices: NDArray[np.int64]  # (A,): place of the annotation's image, -1 where there is none
    category_ids: NDArray[np.int64]  # (A,)
    boxes_xywh: NDArray[np.float64]  # (A, 4)
    areas: NDArray[np.float64]  # (A,)
    iscrowd: NDArray[np.bool_]  # (A,)
    segmentations: Segmentations | None  # of all annotations
    segmentation_mistakes: list[Mistake]


class _Selection(NamedTuple):
    """Which images and annotations a data set uses."""

    images: NDArray[np.int64]  # places among the file's images
    annotations: NDArray[np.int64]  # places among the file's annotations
    boxes_xyxy: NDArray[np.float32]  # theirs, (len(annotations), 4)
    notes: str  # what was left out or changed, for the summary


def _read(path: Path, masks: bool) -> _Content:
    """Decode the file, with its segmentations for masks, and check it: every mistake in it ends here."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"the annotation file {path} {what}; {describe_near(path, '.json')}")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty; it should be a COCO instances file")
    with path.open("rb") as file:
        # Not closed by hand: the undecoded annotations point into it. It goes when they do.
        text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        document = msgspec.json.decode(text, type=_Document)
    except msgspec.ValidationError as error:
        _raise_structure_error(path, text, error)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise syntax_error(path, text, error) from None
    except RecursionError:
        raise _depth_error(path) from None

    image_ids = np.array([image.id for image in document.images], np.int64)
    num_annotations = len(document.annotations)
    ids, named_images, category_ids = np.empty((3, num_annotations), np.int64)
    boxes_xywh = np.empty((num_annotations, 4))
    areas = np.empty(num_annotations)
    iscrowd = np.empty(num_annotations, np.bool_)
    segmentations = SegmentationReader() if masks else None
    decode = msgspec.json.Decoder(_UndecodedAnnotation if masks else _Annotation).decode
    for start in range(0, num_annotations, _CHUNK):
        part = slice(start, start + _CHUNK)
        try:
            chunk = [decode(raw) for raw in document.annotations[part]]
            if segmentations is not None:
                for annotation in chunk:
                    assert isinstance(annotation, _UndecodedAnnotation)
                    segmentations.add(annotation.segmentation)
        except (msgspec.ValidationError, UnicodeDecodeError):
            _raise_annotation_error(path, document.annotations, _SegmentedAnnotation if masks else _Annotation)
        ids[part] = [annotation.id for annotation in chunk]
        named_images[part] = [annotation.image_id for annotation in chunk]
        category_ids[part] = [annotation.category_id for annotation in chunk]
        boxes_xywh[part] = [annotation.bbox for annotation in chunk]
        areas[part] = [a.bbox[2] * a.bbox[3] if a.area is None else a.area for a in chunk]
        iscrowd[part] = [bool(annotation.iscrowd) for annotation in chunk]
    sizes = np.array([(i.width, i.height) for i in document.images], np.int64).reshape(-1, 2)
    image_indices = _places(named_images, image_ids)
    content = _Content(
        image_ids=image_ids,
        sizes=sizes,
        file_names=[image.file_name for image in document.images],
        categories={category.id: category.name for category in document.categories},
        all_category_ids=np.array([category.id for category in document.categories], np.int64),
        annotation_ids=ids,
        image_indices=image_indices,
        category_ids=category_ids,
        boxes_xywh=boxes_xywh,
        areas=areas,
        iscrowd=iscrowd,
        segmentations=segmentations.segmentations() if segmentations else None,
        segmentation_mistakes=segmentations.mistakes(sizes, image_indices) if segmentations else [],
    )
    _check_content(path, content)
    return content


def _raise_structure_error(path: Path, text: mmap.mmap, error: msgspec.ValidationError) -> NoReturn:
    """Say which part of the file is not what a COCO instances file has there."""
    rule = "a COCO instances file is an object with the keys images, annotations and categories"
    if " - at " in str(error):
        raise ValueError(f"{path}: {error}; {rule}") from None
    try:
        keys = msgspec.json.decode(text, type=dict[str, msgspec.Raw]).keys()
    except msgspec.ValidationError:
        hint = " (a list of detections is a results file)" if text[:64].lstrip().startswith(b"[") else ""
        raise ValueError(f"{path}: {error} at its top{hint}; {rule}") from None
    except RecursionError:
        raise _depth_error(path) from None
    missing = [key for key in _Document.__struct_fields__ if key not in keys]
    raise ValueError(f"{path} has the keys {listed(keys)} and lacks {', '.join(missing)}; {rule}") from None


def _depth_error(path: Path) -> ValueError:
    return ValueError(
        f"{path} nests lists or objects too deeply to be read; in a COCO instances file nothing is deeper than the "
        f"segmentation of an annotation"
    )


def _raise_annotation_error(path: Path, annotations: Iterable[msgspec.Raw], kind: type[_Annotation]) -> NoReturn:
    """Find every annotation that does not decode and show the first few."""
    wrong = []
    for place, raw in enumerate(annotations):
        try:
            msgspec.json.decode(raw, type=kind)
        except (msgspec.ValidationError, UnicodeDecodeError) as error:
            where = f"$.annotations[{place}]"
            reason = str(error).replace("`$", f"`{where}")
            wrong.append(reason if where in reason else f"{reason} - at `{where}`")
    shown = "".join(f"\n- {reason}" for reason in wrong[:_NUM_SHOWN])
    masks = ", and for masks a segmentation" if kind is _SegmentedAnnotation else ""
    raise ValueError(
        f"{path}: {len(wrong)} annotations cannot be read; each needs id, image_id, category_id and "
        f"bbox = [x, y, width, height]{masks}. The first:{shown}"
    ) from None


def _check_mixing(train: bool, mosaic: Mosaic | None, copy_paste: CopyPaste | None) -> None:
    for name, mixing in (("mosaic", mosaic), ("copy_paste", copy_paste)):
        if mixing is not None and not train:
            raise ValueError(
                f"{name} is given with train=False, but the ground truth of an evaluation is the file's; leave "
                f"{name} out, or use train=True"
            )


def _check_masks(masks: bool | Literal["rle"], train: bool, transform: Transform | None) -> None:
    if masks not in (True, False, "rle"):
        raise ValueError(f"masks={masks!r} is unknown; use True for pixels, 'rle' for run lengths, or False for none")
    if masks == "rle" and (train or transform is not None):
        given = "train=True" if train else "a transform"
        raise ValueError(f"masks='rle' is given with {given}, but only masks as pixels can be changed; use masks=True")


def _check_folder_exists(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"the image folder {folder} does not exist; {describe_near(folder, '')}")


def _check_content(path: Path, content: _Content) -> None:
    """Every rule on values that the decoder cannot check; all mistakes are reported together."""
    mistakes: list[str] = []

    def check(wrong: NDArray[np.bool_], ids: NDArray[np.int64], kind: str, rule: str) -> None:
        if wrong.any():
            mistakes.append(f"{int(wrong.sum())} {kind}: {rule} (ids {listed(ids[wrong])})")

    if not len(content.image_ids):
        mistakes.append("it lists no images; at least one is needed")
    if not content.categories:
        mistakes.append("it lists no categories; at least one is needed")
    for kind, ids in (
        ("images", content.image_ids),
        ("categories", content.all_category_ids),
        ("annotations", content.annotation_ids),
    ):
        check(_repeats(ids), ids, kind, "the id was used before; ids must be unique")
    check(content.sizes.min(axis=1) <= 0, content.image_ids, "images", "width and height must be positive")
    leaving = np.array([_leaves_folder(name) for name in content.file_names], np.bool_)
    if leaving.any():
        names = [content.file_names[i] for i in np.flatnonzero(leaving)]
        mistakes.append(
            f"{len(names)} images: file_name must be relative and stay in the image folder ({listed(names)})"
        )
    annotation_ids = content.annotation_ids
    check(content.image_indices < 0, annotation_ids, "annotations", "image_id names no image of the file")
    unknown = _places(content.category_ids, content.all_category_ids) < 0
    check(unknown, annotation_ids, "annotations", "category_id names no category of the file")
    negative = content.boxes_xywh[:, 2:].min(axis=1) < 0
    check(negative, annotation_ids, "annotations", "the width and height of bbox must not be negative")
    too_large = np.abs(content.boxes_xywh).max(axis=1) > _MAX_COORDINATE
    check(too_large, annotation_ids, "annotations", f"bbox must be within ± {_MAX_COORDINATE:g} pixels")
    for wrong, rule in content.segmentation_mistakes:
        check(wrong, annotation_ids, "annotations", rule)
    if mistakes:
        raise ValueError(f"{path} is no valid COCO instances file:" + "".join(f"\n- {m}" for m in mistakes))


def _leaves_folder(name: str) -> bool:
    return posixpath.isabs(name) or (".." in name and posixpath.normpath(name).split("/")[0] == "..")


def _check_images_exist(folder: Path, file_names: Sequence[str]) -> None:
    """Every image is on disk, by one directory listing a folder: a stat an image takes minutes on a network."""
    by_parent: dict[str, list[str]] = defaultdict(list)
    for name in file_names:
        by_parent[posixpath.dirname(name)].append(name)
    missing = []
    for parent, names in by_parent.items():
        try:
            with os.scandir(folder / parent) as entries:
                present = {entry.name for entry in entries}
        except (FileNotFoundError, NotADirectoryError):
            present = set()
        missing += [name for name in names if posixpath.basename(name) not in present]
    if missing:
        found = sorted(path.name for path in folder.iterdir())
        raise IncompleteDataError(
            f"{len(missing)} of {len(file_names)} images are not in {folder}: {listed(missing)}; it holds "
            f"{listed(found) if found else 'nothing'}. Check that the folder belongs to the annotation file"
        )


def _labels_of(content: _Content) -> tuple[dict[int, str], dict[int, int], dict[int, int]]:
    """label -> name, label -> category id, category id -> label, with labels 1..K by rising category id."""
    category_ids = dict(enumerate(sorted(content.categories), start=1))
    class_names = {label: content.categories[category_id] for label, category_id in category_ids.items()}
    return class_names, category_ids, {category_id: label for label, category_id in category_ids.items()}


def _labels_in_order(category_ids: NDArray[np.int64], labels: dict[int, int]) -> NDArray[np.int64]:
    """The label of each category id; `labels` is by rising category id, from 1."""
    return np.searchsorted(np.fromiter(labels, np.int64), category_ids) + 1


def _select_all(content: _Content) -> _Selection:
    """Ground truth for evaluation: all of the file, unchanged."""
    return _Selection(
        images=np.arange(len(content.image_ids)),
        annotations=np.arange(len(content.annotation_ids)),
        boxes_xyxy=_to_xyxy(content.boxes_xywh).astype(np.float32),
        notes="",
    )


def _select_for_training(content: _Content, keep_empty: bool) -> _Selection:
    """Ground truth for training: no crowds, boxes clipped, degenerate ones dropped with a warning."""
    annotations = np.flatnonzero(~content.iscrowd)
    boxes = _to_xyxy(content.boxes_xywh[annotations])
    limits = content.sizes[content.image_indices[annotations]]
    clipped = np.clip(boxes, 0, np.tile(limits, 2))
    # Rounded, since 1.8 + 1 - 1.8 is a little less than 1.
    degenerate = (np.round(clipped[:, 2:] - clipped[:, :2], 6) < MIN_BOX_SIDE).any(1)
    if degenerate.any():
        warnings.warn(
            f"{int(degenerate.sum())} boxes less than {MIN_BOX_SIDE:g} px wide or high after clipping were "
            f"dropped (annotation ids {listed(content.annotation_ids[annotations[degenerate]])})",
            stacklevel=3,
        )
    clipped_boxes = clipped.astype(np.float32)
    # Compared in float32: a box that ends at 640.00000001 by rounding of x + width is not outside.
    num_clipped = int((clipped_boxes != boxes.astype(np.float32)).any(1)[~degenerate].sum())

    num_images = len(content.image_ids)
    annotations = annotations[~degenerate]
    annotated = np.bincount(content.image_indices, minlength=num_images) > 0
    left = np.bincount(content.image_indices[annotations], minlength=num_images) > 0
    images = np.flatnonzero(left | ~annotated if keep_empty else left)
    return _Selection(
        images=images,
        annotations=annotations,
        boxes_xyxy=clipped_boxes[~degenerate],
        notes=(
            f" For training, {int(content.iscrowd.sum())} crowd regions and {int(degenerate.sum())} degenerate "
            f"boxes were dropped, {num_clipped} boxes clipped to their image, {int((annotated & ~left).sum())} "
            f"images left out because all of their annotations were dropped, and {int((~annotated).sum())} "
            f"images without annotations {'kept as negatives' if keep_empty else 'left out'}."
        ),
    )


def _summarise(path: Path, content: _Content, selection: _Selection) -> str:
    num_crowds = int(content.iscrowd[selection.annotations].sum())
    with_boxes = len(np.unique(content.image_indices[selection.annotations]))
    return (
        f"{path.name}: {len(selection.images)} images ({len(selection.images) - with_boxes} of them without "
        f"boxes), {len(selection.annotations)} boxes ({num_crowds} of them crowd regions), "
        f"{len(content.categories)} classes.{selection.notes}"
    )


def _generator(seed: int | None, number: int) -> np.random.Generator:
    """Random numbers of their own, of this number: the transform draws from the seed itself."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,)))


def _to_xyxy(boxes_xywh: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate((boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]), axis=1)


def _places(values: NDArray[np.int64], table: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each value in the unsorted table, -1 where it is not in there."""
    if not len(table):
        return np.full(len(values), -1)
    order = np.argsort(table, kind="stable")
    found = order[np.searchsorted(table, values, sorter=order).clip(max=len(table) - 1)]
    return np.where(table[found] == values, found, -1)


def _repeats(ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True at every id that stands in the array a second time."""
    repeats = np.ones(len(ids), np.bool_)
    repeats[np.unique(ids, return_index=True)[1]] = False
    return repeats
