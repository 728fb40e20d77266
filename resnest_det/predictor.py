"""A checkpoint and images -> predictions, at the sizes of its run's evaluation, in its tiles or windows, in float32."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from resnest_det.backbones import load_weights
from resnest_det.backbones.weights import read_plain
from resnest_det.build import build_detection_inference, build_detector, build_inference, build_segmenter
from resnest_det.config import (
    DetectionSettings,
    SegmentationSettings,
    find_experiment,
    load_either_settings,
    settings_from_data,
)
from resnest_det.data import ADE20K_CLASS_NAMES, ADE20K_PALETTE
from resnest_det.data.files import channels_first, describe_near, listed, read_rgb, rgb_pixels
from resnest_det.data.mask_folder import MAX_CLASSES
from resnest_det.distributed import images_to_device, select_device
from resnest_det.experiment import find_checkpoint
from resnest_det.shipped import shipped_file
from resnest_det.visualize import draw_boxes, draw_segmentation

ImageLike: TypeAlias = str | Path | Image.Image | NDArray[np.uint8] | Tensor
Settings: TypeAlias = DetectionSettings | SegmentationSettings

_BACKGROUND = "__background__"  # torchvision's name of label 0


class Predictor:
    """A trained model that takes images as they come, and answers in their pixels.

    The model is run as its run evaluates it, at the same sizes, and mirrored, in tiles or in windows where the settings
    say so; always in float32, where the evaluation may compute in the run's precision. Images of one size go through it
    together, and sizes one after the other, so that no image's predictions depend on which others it came with.

    Args:
        model: a detector or a segmentation model with its weights. It is moved to the device and put into evaluation
            mode.
        settings: those it was built from; `eval` says how it is run.
        class_names: the name of each label: a detector's from 1, a segmentation model's from 0.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        score_threshold: detections of a lower score are left out; None leaves out none that the model gives.

    Raises:
        ValueError: there is no such device, or the score threshold is outside [0, 1] or given for a segmentation model.

    Attributes:
        task: "detection" or "segmentation".
        class_names: the name of each label.
        colours: ADE20K's own colours where the classes are ADE20K's; else None, and pictures have `class_colour`'s.

    Example:
        >>> predictor = Predictor.from_checkpoint("runs/sample", score_threshold=0.5)  # doctest: +SKIP
        >>> prediction = predictor("photo.jpg")  # doctest: +SKIP
        >>> Image.fromarray(predictor.draw("photo.jpg", prediction)).save("drawn.jpg")  # doctest: +SKIP
    """

    task: Literal["detection", "segmentation"]

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        class_names: Mapping[int, str],
        *,
        device: str = "auto",
        score_threshold: float | None = None,
    ) -> None:
        self.settings = settings
        self.class_names = dict(class_names)
        self.score_threshold = score_threshold
        _check_score_threshold(score_threshold, settings)
        if isinstance(settings, DetectionSettings):
            self.task = "detection"
            self._detect = build_detection_inference(
                settings.eval, detections_per_image=settings.model.detections_per_image
            )
        else:
            self.task = "segmentation"
            self._segment = build_inference(settings.eval)
        is_ade20k = self.task == "segmentation" and self.class_names == dict(enumerate(ADE20K_CLASS_NAMES))
        self.colours = dict(enumerate(ADE20K_PALETTE)) if is_ade20k else None
        self.device = select_device(device)
        self.model = model.to(self.device).eval()

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        config: str | Path | None = None,
        class_names: Mapping[int, str] | Sequence[str] | None = None,
        device: str = "auto",
        score_threshold: float | None = None,
    ) -> Predictor:
        """The predictor of a run folder's best checkpoint, of any checkpoint of a run, or of another file of weights.

        The moving average of the weights is taken where the checkpoint has one. Nothing is fetched.

        Args:
            path: a run folder; or a file: a run's checkpoint, wherever it lies, or a state dict (see load_weights),
                such as torchvision's.
            config: the settings that the model is built from and run by: a .toml file, or the name of a shipped one,
                such as "det/sample". None takes those in the checkpoint, or of the config.toml beside it. Where its
                data are is not asked for.
            class_names: the names by label, or in order: a detector's from label 1, or from label 0 where the first is
                "__background__", as torchvision lists them; a segmentation model's from label 0. None takes those in
                the checkpoint.
            device: see Predictor.
            score_threshold: detections of a lower score are left out; None takes what the settings say,
                `model.score_threshold`. Below that, the model is built to give more.

        Raises:
            FileNotFoundError: there is nothing at the path.
            ValueError: the file says neither its settings nor its classes, and they are not given; or the weights are
                not those of the model; or settings, class names or threshold are mistaken.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"there is no run folder or checkpoint {path}; {describe_near(path, path.suffix)}")
        file = find_checkpoint(path)
        content = _read_checkpoint(file, must_be_plain=config is None)
        settings = _find_settings(file, content, config)
        names = class_names if class_names is not None else content.get("class_names")
        if names is None:
            raise ValueError(
                f"{file} does not say what its classes are called, as no file but a run's checkpoint does; give "
                f"class_names= (--classes), in the order of the labels"
            )
        _check_score_threshold(score_threshold, settings)
        if score_threshold is not None and isinstance(settings, DetectionSettings):
            lower = min(score_threshold, settings.model.score_threshold)
            model_settings = settings.model.model_copy(update={"score_threshold": lower})
            settings = settings.model_copy(update={"model": model_settings})
        labelled = _by_label(names, settings)
        trained = content.get("class_names")
        if trained and len(labelled) != len(trained):
            raise ValueError(
                f"class_names has {len(labelled)} names, but {file} was trained on {len(trained)} classes: "
                f"{listed(trained.values())}; give one name for each, or none"
            )
        num_classes = max(labelled) + 1  # a detector's background is label 0, and counts
        model = (
            build_detector(settings.model, num_classes, load_weights=False)
            if isinstance(settings, DetectionSettings)
            else build_segmenter(settings.model, num_classes, load_weights=False)
        )
        load_weights(model, file)
        return cls(model, settings, labelled, device=device, score_threshold=score_threshold)

    def __call__(self, image: ImageLike) -> dict[str, Tensor]:
        """The prediction of one image.

        Args:
            image: a file of any mode, or Pillow's image, turned as its EXIF tag says; a uint8 RGB array (H, W, 3); or
                a tensor (3, H, W), RGB, uint8 or float in [0, 1].

        Returns:
            On the CPU: of a detector "boxes" (N, 4) xyxy in pixels of the image, "labels" (N,) and "scores" (N,), best
            first, and, where it has masks, "masks" (N, H, W), boolean; of a segmentation model "out", the label of each
            pixel, int64 (H, W).

        Raises:
            UnreadableImageError: the file cannot be decoded; a ValueError.
            ValueError: an array or tensor of another shape or type, or an image too long and narrow to be resized.
        """
        return self.predict_batch([image])[0]

    @torch.no_grad()
    def predict_batch(self, images: Sequence[ImageLike]) -> list[dict[str, Tensor]]:
        """The predictions of several images, all of which are in memory, and those of one size in one batch.

        Args:
            images: each as in a call, of any sizes.

        Returns:
            For each what a call returns; the numbers may differ from it by rounding.

        Raises as a call does.
        """
        inputs = [_as_tensor(image) for image in images]
        of_size: dict[tuple[int, ...], list[int]] = {}
        for place, image in enumerate(inputs):
            of_size.setdefault(tuple(image.shape), []).append(place)
        predictions: dict[int, dict[str, Tensor]] = {}
        for places in of_size.values():
            batch = images_to_device([inputs[place] for place in places], self.device)
            predictions.update(zip(places, self._predict(batch), strict=True))
        return [predictions[place] for place in range(len(inputs))]

    def check_size(self, height: int, width: int) -> None:
        """Refuse an image of which resizing would leave nothing, as a call does.

        Raises:
            ValueError: the image is too long and narrow.
        """
        if isinstance(self.settings, DetectionSettings):
            _check_proportions(self.model, (height, width), self.settings.eval)

    def _predict(self, batch: list[Tensor]) -> list[dict[str, Tensor]]:
        """The predictions of images (3, H, W) of one size, float in [0, 1], on the device."""
        if self.task == "segmentation":
            return [{"out": labels.cpu()} for labels in self._segment(self.model, batch)]
        self.check_size(*batch[0].shape[-2:])
        found = self.model(batch) if self._detect is None else self._detect(self.model, batch)
        return [_on_cpu(detections, batch[0].shape[-2:], self.score_threshold) for detections in found]

    def draw(self, image: ImageLike, prediction: Mapping[str, Any]) -> NDArray[np.uint8]:
        """A picture of the image with its boxes and masks, or with the classes' colours and what they mean below it.

        Args:
            image: as in a call.
            prediction: what was returned for it.

        Returns:
            The picture (H, W, 3), RGB; a small image is enlarged until what is written can be read.
        """
        pixels = as_pixels(image)
        if self.task == "segmentation":
            return draw_segmentation(pixels, prediction["out"], self.class_names, self.colours)
        return draw_boxes(
            pixels,
            prediction["boxes"],
            prediction["labels"],
            self.class_names,
            prediction["scores"],
            masks=prediction.get("masks"),
        )


def as_pixels(image: ImageLike) -> NDArray[np.uint8]:
    """An image of any kind that a Predictor takes as RGB (H, W, 3).

    Raises:
        UnreadableImageError: the file cannot be decoded; a ValueError.
        ValueError: an array or tensor of another shape or type.
    """
    if isinstance(image, str | Path):
        return read_rgb(Path(image), 0, 0)  # of no expected size, so always turned
    if isinstance(image, Image.Image):
        return rgb_pixels(ImageOps.exif_transpose(image))
    if isinstance(image, Tensor):
        return np.ascontiguousarray(_as_bytes(_checked_tensor(image)).cpu().numpy().transpose(1, 2, 0))
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"the image is of the type {type(image).__name__}; give a file's path, an image of Pillow's, an array "
            f"(H, W, 3) or a tensor (3, H, W)"
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(
            f"the image is an array of {image.dtype} {image.shape}; an array is uint8 RGB (H, W, 3) with at least one "
            f"pixel, and a tensor has its channels first"
        )
    return np.ascontiguousarray(image)


def _as_tensor(image: ImageLike) -> Tensor:
    """The image (3, H, W), uint8, or float32 in [0, 1]."""
    return _checked_tensor(image) if isinstance(image, Tensor) else channels_first(as_pixels(image))


def _checked_tensor(image: Tensor) -> Tensor:
    if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(
            f"the image is a tensor of shape {tuple(image.shape)}; a tensor is RGB (3, H, W) with at least one pixel, "
            f"and an array has its channels last"
        )
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise ValueError(f"the image is a tensor of {_type_name(image)}; give uint8, or float in [0, 1]")
    image = image.float()
    low, high = image.aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"the image is a float tensor with values from {low:.3g} to {high:.3g}, expected [0, 1]; divide bytes by "
            f"255, and do not normalise: the model does"
        )
    return image


def _as_bytes(image: Tensor) -> Tensor:
    return image if image.dtype == torch.uint8 else (image * 255).round().to(torch.uint8)


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_proportions(model: Any, size: Sequence[int], settings: Any) -> None:
    """Refuse an image of which the detector's resizing would leave nothing: torchvision names no cause."""
    short, long = sorted(size)
    if settings.tile and not settings.whole_image:
        long = min(long, settings.tile)
    least, bound = model.transform.min_size[-1], model.transform.max_size
    if settings.short_sides:  # where max_side is 0, the model's bound grows and shrinks with the short side
        bound = settings.max_side or round(bound * min(settings.short_sides) / least)
    if int(short * (bound / long)) < 1:
        raise ValueError(
            f"an image is {size[1]} x {size[0]} pixels: resized to a long side of {bound} it would "
            f"have less than a pixel on its short side; cut it into pieces, or use eval.tile"
        )


def _on_cpu(detections: Mapping[str, Any], size: Sequence[int], score_threshold: float | None) -> dict[str, Tensor]:
    """Detections from that score on, on the CPU and with boolean masks (N, H, W)."""
    kept = torch.ones_like(detections["scores"], dtype=torch.bool)
    if score_threshold is not None:
        kept = detections["scores"] >= score_threshold
    result = {key: detections[key][kept].cpu() for key in ("boxes", "labels", "scores")}
    if "masks" in detections:
        masks = detections["masks"]
        if isinstance(masks, Tensor):
            result["masks"] = (masks[kept] > 0.5)[:, 0].cpu()  # (N, 1, H, W)
        else:  # in tiles they are run lengths
            encoded = [mask for mask, is_kept in zip(masks, kept.tolist(), strict=True) if is_kept]
            dense = coco_mask.decode(encoded) if encoded else np.zeros((*size, 0), np.uint8)  # (H, W, N)
            result["masks"] = torch.from_numpy(dense).permute(2, 0, 1).bool().contiguous()
    return result


def _check_score_threshold(score_threshold: float | None, settings: Settings) -> None:
    if score_threshold is None:
        return
    if isinstance(settings, SegmentationSettings):
        raise ValueError(
            f"score_threshold is {score_threshold}, and a segmentation model gives every pixel a class, whatever its "
            f"score; leave it out"
        )
    if not 0 <= score_threshold <= 1:
        raise ValueError(f"score_threshold is {score_threshold}, expected 0 to 1, as scores are")


def _read_checkpoint(file: Path, *, must_be_plain: bool) -> dict[str, Any]:
    """What a checkpoint holds; nothing of a file that is none of torch.save's."""
    if file.suffix == ".safetensors":
        return {}
    try:
        content = read_plain(file)
    except ValueError:
        if must_be_plain:
            raise
        return {}  # where the settings are given, load_weights says what it is
    return content if isinstance(content, dict) else {}


def _find_settings(file: Path, content: Mapping[str, Any], config: str | Path | None) -> Settings:
    """The settings that are given, those in the checkpoint, or those of the config.toml beside it."""
    if config is not None:
        return _read_config(config)
    if "settings" in content:
        return settings_from_data(content["settings"], str(file))
    beside = file.with_name("config.toml")
    if not beside.is_file():
        raise ValueError(
            f"{file} does not say what model its weights belong to, as a run's checkpoint or the config.toml beside "
            f"it would; give config= (--config), a file of the model's settings, and class_names= (--classes)"
        )
    return settings_from_data(tomllib.loads(beside.read_text(encoding="utf-8")), str(beside))


def _read_config(config: str | Path) -> Settings:
    """The settings of a file, or of a shipped one by its name; of which task they are shows in what they fit."""
    path = Path(config)
    if path.suffix != ".toml":
        path = find_experiment(str(config), shipped_file("configs"))
    return load_either_settings(path, ["data.root=."])  # no data are read, and many files name none


def _by_label(class_names: Mapping[int, str] | Sequence[str], settings: Settings) -> dict[int, str]:
    """Class names by label, from the first that the task has, without holes."""
    is_detection = isinstance(settings, DetectionSettings)
    if isinstance(class_names, str):
        raise ValueError(f"class_names is the text {class_names!r}; give a list of names, or a dict by label")
    if isinstance(class_names, Mapping):
        names = dict(class_names)
    elif is_detection and class_names[:1] and class_names[0] == _BACKGROUND:
        names = dict(enumerate(class_names[1:], start=1))
    else:
        names = dict(enumerate(class_names, start=1 if is_detection else 0))
    lowest = 1 if is_detection else 0
    if not names:
        raise ValueError("class_names is empty; name at least one class")
    if min(names) < lowest:
        reason = "label 0 is the background, and labels count from 1" if is_detection else "labels count from 0"
        raise ValueError(f"class_names has the label {min(names)} {names[min(names)]!r}, but {reason}")
    if not is_detection and len(names) > MAX_CLASSES:
        raise ValueError(f"class_names has {len(names)} classes; a label map of 8 bits holds at most {MAX_CLASSES}")
    return {label: str(names.get(label, f"label {label}")) for label in range(lowest, max(names) + 1)}
