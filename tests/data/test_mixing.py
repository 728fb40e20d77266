"""Mosaic and copy-paste: by themselves on known images, and in CocoDetection."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader

from resnest_det.data import CocoDetection, CopyPaste, DetectionAugmentation, Mosaic, coco
from resnest_det.data.files import UnreadableImageError
from resnest_det.data.mixing import AnnotatedImage

# pycocotools' extension module answers NumPy's newer protocol in an older way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

WIDTH, HEIGHT = 40, 30
MEAN_COLOUR = [124, 116, 104]


def annotated(
    boxes: list[list[float]], *, with_masks: bool, colour: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT)
) -> AnnotatedImage:
    """A plain image (width, height); object i fills its box with `colour` + 1 + i, which is its label too."""
    width, height = size
    image = np.full((height, width, 3), colour, np.uint8)
    masks = np.zeros((len(boxes), height, width), np.uint8)
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        inside = (slice(round(y1), round(y2)), slice(round(x1), round(x2)))
        image[inside] = colour + 1 + i
        masks[i][inside] = 1
    xyxy = np.array(boxes, np.float32).reshape(-1, 4)
    labels = np.arange(colour + 1, colour + 1 + len(boxes))
    areas = (xyxy[:, 2] - xyxy[:, 0]).astype(np.float64) * (xyxy[:, 3] - xyxy[:, 1])
    return AnnotatedImage(image, xyxy, labels, areas, np.zeros(len(boxes), np.bool_), masks if with_masks else None)


class Fixed(np.random.Generator):
    """Draws what it was given."""

    def __init__(self, *, integers: Any = None, permutation: Any = None) -> None:
        super().__init__(np.random.PCG64(0))
        self.drawn = {"integers": integers, "permutation": permutation}

    def integers(self, *_arguments: Any, **_options: Any) -> Any:
        return np.array(self.drawn["integers"])

    def permutation(self, *_arguments: Any, **_options: Any) -> Any:
        return np.array(self.drawn["permutation"])


def pixels_of(sample: AnnotatedImage, i: int) -> np.ndarray:
    """The image where the mask of object i is, (P, 3)."""
    assert sample.masks is not None
    return sample.image[sample.masks[i].astype(bool)]


def box_around(mask: np.ndarray) -> list[int]:
    y, x = mask.nonzero()
    return [x.min(), y.min(), x.max() + 1, y.max() + 1]


# --- mosaic


@pytest.mark.parametrize("with_masks", [False, True])
def test_mosaic_of_plain_images(with_masks: bool) -> None:
    colours = (10, 20, 30, 40)
    images = [annotated([[20, 6, 32, 16]], with_masks=with_masks, colour=c, size=(40, 20)) for c in colours]
    mixed = Mosaic(1, side=40)(images, Fixed(integers=[15, 25]))
    assert mixed.image.shape == (40, 40, 3)
    expected = np.full((40, 40), -1)
    expected[5:25, :15], expected[5:25, 15:], expected[25:, :15], expected[25:, 15:] = colours
    expected[11:21, :7], expected[11:21, 35:], expected[31:, :7], expected[31:, 35:] = 11, 21, 31, 41
    for channel, empty in enumerate(MEAN_COLOUR):
        assert (mixed.image[:, :, channel] == np.where(expected == -1, empty, expected)).all()
    assert mixed.boxes_xyxy.tolist() == [[0, 11, 7, 21], [35, 11, 40, 21], [0, 31, 7, 40], [35, 31, 40, 40]]
    assert mixed.labels.tolist() == [11, 21, 31, 41]
    assert mixed.areas.tolist() == [70, 50, 63, 45]
    assert mixed.iscrowd.tolist() == [False] * 4
    dtypes = [a.dtype for a in (mixed.image, mixed.boxes_xyxy, mixed.labels, mixed.areas, mixed.iscrowd)]
    assert dtypes == [np.uint8, np.float32, np.int64, np.float64, np.bool_]
    assert (mixed.masks is not None) == with_masks
    if mixed.masks is not None:
        assert (mixed.masks == (expected == np.array([11, 21, 31, 41])[:, None, None])).all()


def test_mosaic_scales_every_image_to_the_canvas() -> None:
    images = [
        annotated([[12, 2, 18, 6]], with_masks=True, size=(20, 10)),
        annotated([[2, 12, 8, 16]], with_masks=True, size=(10, 20)),
        annotated([[100, 4, 112, 12]], with_masks=True, size=(160, 40)),
        annotated([[2, 2, 8, 6]], with_masks=True, size=(80, 80)),
    ]
    mixed = Mosaic(1, side=80)(images, Fixed(integers=[40, 40]))
    assert mixed.boxes_xyxy.tolist() == [[8, 8, 32, 24], [48, 8, 72, 24], [10, 42, 16, 46], [42, 42, 48, 46]]
    assert mixed.areas.tolist() == [24 * 16, 24 * 16, 6 * 4, 6 * 4]
    assert mixed.masks is not None
    assert [box_around(mask) for mask in mixed.masks] == mixed.boxes_xyxy.tolist()


def test_mosaic_as_large_as_its_first_image() -> None:
    images = [annotated([], with_masks=False, size=size) for size in ((30, 50), (10, 10), (80, 10), (20, 20))]
    assert Mosaic(1)(images, np.random.default_rng(0)).image.shape == (50, 50, 3)


def test_mosaic_without_masks_scales_the_annotated_area() -> None:
    image = annotated([[10, 10, 20, 20]], with_masks=False, size=(20, 20))
    image.areas[:] = 30  # of a shape in its box
    mixed = Mosaic(1, side=80)([image] * 4, Fixed(integers=[40, 30]))
    assert mixed.boxes_xyxy.tolist() == [[0, 0, 40, 30], [0, 70, 40, 80]]
    assert mixed.areas.tolist() == [30 * 16 * 3 / 4, 30 * 16 / 4]


@pytest.mark.parametrize(("min_visible", "labels"), [(0.0, [1, 2, 3]), (0.3, [1, 3]), (0.6, [3]), (1.0, [3])])
@pytest.mark.parametrize("with_masks", [False, True])
def test_mosaic_leaves_out_what_is_cut_away(with_masks: bool, min_visible: float, labels: list[int]) -> None:
    """With the point at (30, 30), 10 columns of an image on the left are cut away."""
    boxes = [[5, 5, 15, 15], [2, 5, 12, 15], [20, 5, 30, 15], [0, 5, 10, 15], [0, 16, 10.4, 26]]
    image, empty = annotated(boxes, with_masks=with_masks), annotated([], with_masks=with_masks)
    mixed = Mosaic(1, side=40, min_visible=min_visible)([image, empty, empty, empty], Fixed(integers=[30, 30]))
    assert mixed.labels.tolist() == labels


def test_mosaic_without_objects() -> None:
    mixed = Mosaic(1, side=80)([annotated([], with_masks=True)] * 4, np.random.default_rng(0))
    assert mixed.boxes_xyxy.shape == (0, 4)
    assert mixed.masks is not None
    assert mixed.masks.shape == (0, 80, 80)


def test_mosaic_point_lies_in_the_middle_half() -> None:
    images = [annotated([], with_masks=False, colour=colour, size=(40, 40)) for colour in (10, 20, 30, 40)]
    corners = set()
    for seed in range(300):
        image = Mosaic(1, side=40)(images, np.random.default_rng(seed)).image[:, :, 0]
        y, x = (image == 40).nonzero()
        corners.add((int(x.min()), int(y.min())))
    for axis in range(2):
        assert {corner[axis] for corner in corners} == set(range(10, 31))


def test_mosaic_takes_four_images() -> None:
    with pytest.raises(ValueError, match="3 images make no mosaic; give 4"):
        Mosaic(1)([annotated([], with_masks=False)] * 3, np.random.default_rng(0))


# --- copy-paste


def test_pasted_objects_cover_what_is_below() -> None:
    below = annotated([[0, 0, 10, 10], [20, 0, 30.5, 10], [20, 20, 24, 24]], with_masks=True)
    above = annotated([[0, 0, 40, 30], [5, 0, 15, 20], [18, 18, 26, 26]], with_masks=True, colour=100)
    before = below.image.copy()
    mixed = CopyPaste(1)(below, above, Fixed(integers=2, permutation=[2, 1, 0]))
    assert mixed.labels.tolist() == [1, 2, 102, 103]
    # The first is cut, the second is as it was, the third is covered altogether.
    assert mixed.boxes_xyxy.tolist() == [[0, 0, 5, 10], [20, 0, 30.5, 10], [5, 0, 15, 20], [18, 18, 26, 26]]
    assert mixed.areas.tolist() == [50, 100, 200, 64]
    assert mixed.iscrowd.tolist() == [False] * 4
    expected = before.copy()
    expected[:20, 5:15], expected[18:26, 18:26] = 102, 103  # nothing else of the other image
    assert (mixed.image == expected).all()
    for i, label in enumerate(mixed.labels):
        assert (pixels_of(mixed, i) == label).all()
    dtypes = [a.dtype for a in (mixed.image, mixed.boxes_xyxy, mixed.labels, mixed.areas, mixed.iscrowd)]
    assert dtypes == [np.uint8, np.float32, np.int64, np.float64, np.bool_]
    assert (below.image == before).all()  # what was given is as it was
    assert below.boxes_xyxy[0].tolist() == [0, 0, 10, 10]


@pytest.mark.parametrize("size", [(20, 60), (60, 20), (80, 60), (20, 15)])
def test_pasting_between_images_of_different_sizes(size: tuple[int, int]) -> None:
    below = annotated([[0, 0, 8, 8]], with_masks=True)
    above = annotated([[5, 5, size[0] - 2, size[1] - 2]], with_masks=True, colour=100, size=size)
    mixed = CopyPaste(1)(below, above, np.random.default_rng(0))
    assert mixed.image.shape == (HEIGHT, WIDTH, 3)
    assert mixed.boxes_xyxy.tolist() == [[0, 0, 8, 8], [5, 5, min(size[0] - 2, WIDTH), min(size[1] - 2, HEIGHT)]]
    assert (pixels_of(mixed, 1) == 101).all()
    assert mixed.areas[0] == 64 - 9


@pytest.mark.parametrize(("min_visible", "labels"), [(0.0, [1, 2, 101]), (0.5, [2, 101]), (0.7, [101])])
def test_copy_paste_leaves_out_what_is_hardly_visible(min_visible: float, labels: list[int]) -> None:
    below = annotated([[0, 0, 10, 10], [0, 12, 10, 22]], with_masks=True)
    above = annotated([[0, 0, 10, 9], [0, 12, 4, 22]], with_masks=True, colour=100)
    both = AnnotatedImage(  # as one object
        above.image,
        np.array([[0, 0, 10, 22]], np.float32),
        above.labels[:1],
        above.areas[:1],
        above.iscrowd[:1],
        np.asarray(above.masks).any(axis=0, keepdims=True).astype(np.uint8),
    )
    mixed = CopyPaste(1, min_visible=min_visible)(below, both, np.random.default_rng(0))
    assert mixed.labels.tolist() == labels


@pytest.mark.parametrize("boxes", [[], [[45, 5, 55, 15]], [[39, 5, 59, 15]]])
def test_nothing_to_paste(boxes: list[list[float]]) -> None:
    """Without objects, and where what is drawn is outside, wholly or but for a twentieth."""
    below = annotated([[0, 0, 8, 8]], with_masks=True)
    above = annotated(boxes, with_masks=True, size=(80, 30))
    assert CopyPaste(1)(below, above, np.random.default_rng(0)) is below


def test_pasting_onto_an_image_without_objects() -> None:
    mixed = CopyPaste(1)(
        annotated([], with_masks=True), annotated([[1, 2, 5, 6]], with_masks=True), np.random.default_rng(0)
    )
    assert mixed.boxes_xyxy.tolist() == [[1, 2, 5, 6]]


def test_every_number_and_every_choice_of_objects_is_drawn() -> None:
    below = annotated([], with_masks=True)
    above = annotated([[0, 0, 5, 5], [10, 0, 15, 5], [20, 0, 25, 5]], with_masks=True)
    drawn = {tuple(CopyPaste(1)(below, above, np.random.default_rng(seed)).labels.tolist()) for seed in range(100)}
    assert drawn == {(1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3)}


@pytest.mark.parametrize("without", [0, 1])
def test_copy_paste_needs_masks(without: int) -> None:
    images = [annotated([[1, 2, 5, 6]], with_masks=place != without) for place in range(2)]
    with pytest.raises(ValueError, match=r"an image came without; use CocoDetection\(masks=True\)"):
        CopyPaste(1)(*images, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (Mosaic, {"probability": 1.5}, "probability=1.5 is outside [0, 1]"),
        (Mosaic, {"probability": float("nan")}, "probability=nan is outside [0, 1]"),
        (Mosaic, {"probability": 1, "min_visible": -0.1}, "min_visible=-0.1 is outside [0, 1]"),
        (Mosaic, {"probability": 1, "side": -1}, "side=-1 is negative; give pixels, or 0"),
        (CopyPaste, {"probability": -1}, "probability=-1 is outside [0, 1]"),
        (CopyPaste, {"probability": 1, "min_visible": 2}, "min_visible=2 is outside [0, 1]"),
    ],
)
def test_arguments_out_of_range(make: Callable[..., object], arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**arguments)


# --- in the data set

NUM_IMAGES, NUM_OBJECTS = 8, 4


def colour_of(label: int) -> list[int]:
    """Far from each other and from black: the objects' colours in the pictures below, which are PNGs."""
    return [60 + 24 * (label % 8), 60 + 24 * (label // 8 % 8), 250 - label]


@pytest.fixture
def coloured(tmp_path: Path) -> tuple[Path, Path]:
    """Black images of 48 x 32 and 32 x 48 with triangles, none over another, every one of a colour and a class."""
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    rng = np.random.default_rng(0)
    for image_id in range(1, NUM_IMAGES + 1):
        width, height = (48, 32) if image_id % 2 else (32, 48)
        picture = np.zeros((height, width, 3), np.uint8)
        for number in range(NUM_OBJECTS):
            label = len(annotations) + 1
            left, top = number % 2 * width / 2, number // 2 * height / 2
            points = np.array([[0, 0], [0.6, 0], [0.3, 0.6]]) + rng.uniform(0.1, 0.35, (3, 2))
            polygon = [(points * (width / 2, height / 2) + (left, top)).round(1).ravel().tolist()]
            mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygon, height, width)))
            picture[mask == 1] = colour_of(label)
            x1, y1, x2, y2 = (int(side) for side in box_around(mask))
            annotations.append(
                {
                    "id": label,
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": int(mask.sum()),
                    "segmentation": polygon,
                }
            )
        Image.fromarray(picture).save(tmp_path / "images" / f"{image_id}.png")
        images.append({"id": image_id, "file_name": f"{image_id}.png", "width": width, "height": height})
    categories = [{"id": a["id"], "name": str(a["id"])} for a in annotations]
    file = tmp_path / "instances.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return tmp_path / "images", file


def load(data: CocoDetection, index: int, seed: int | None) -> tuple[torch.Tensor, dict[str, Any]]:
    sample = data.load(index, seed)
    assert sample is not None
    return sample


def same(left: tuple[torch.Tensor, dict[str, Any]], right: tuple[torch.Tensor, dict[str, Any]]) -> bool:
    if left[1].keys() != right[1].keys() or left[1]["image_id"] != right[1]["image_id"]:
        return False
    pairs = [(left[0], right[0]), *((left[1][key], right[1][key]) for key in left[1] if key != "image_id")]
    return all(torch.equal(*pair) for pair in pairs)


FLIPS = DetectionAugmentation(horizontal_flip=0.5, vertical_flip=0.5)
MOSAIC = Mosaic(0.7, side=48)  # which leaves the images as large as they are
COPY_PASTE = CopyPaste(0.7)


@pytest.mark.parametrize(
    "mixing", [{"mosaic": MOSAIC}, {"copy_paste": COPY_PASTE}, {"mosaic": MOSAIC, "copy_paste": COPY_PASTE}]
)
def test_masks_lie_on_their_objects_to_the_pixel(coloured: tuple[Path, Path], mixing: dict[str, Any]) -> None:
    data = CocoDetection(*coloured, train=True, masks=True, transform=FLIPS, **mixing)
    areas = {a["id"]: a["area"] for a in json.loads(coloured[1].read_text())["annotations"]}
    num_mixed = 0
    for seed in range(40):
        picture, target = load(data, seed % NUM_IMAGES, seed)
        height, width = picture.shape[1:]
        assert len({len(target[key]) for key in ("boxes", "labels", "area", "iscrowd", "masks")}) == 1
        foreign = (target["labels"] - 1) // NUM_OBJECTS + 1 != target["image_id"]
        num_mixed += int(foreign.any())
        for mask, box, label, area in zip(*(target[k] for k in ("masks", "boxes", "labels", "area")), strict=True):
            assert (picture[:, mask.bool()] == torch.tensor(colour_of(int(label)))[:, None]).all()
            assert area == mask.sum()
            x1, y1, x2, y2 = box_around(mask.numpy())
            assert (box >= torch.tensor([0, 0, 0, 0])).all()
            assert (box <= torch.tensor([width, height, width, height])).all()
            assert box[0] <= x1
            assert box[1] <= y1
            assert box[2] >= x2
            assert box[3] >= y2
            if "mosaic" not in mixing:
                assert box.tolist() == [x1, y1, x2, y2]
        labels = set(target["labels"].tolist())
        for missing in set(areas) - labels:  # hardly anything of it is seen
            shown = (picture == torch.tensor(colour_of(missing))[:, None, None]).all(dim=0).sum()
            assert shown < areas[missing] / 2
    assert 20 <= num_mixed <= 40


@pytest.mark.parametrize("masks", [False, True])
def test_boxes_hold_their_colour_at_every_scale(coloured: tuple[Path, Path], masks: bool) -> None:
    transform = DetectionAugmentation((64, 96, 160), 200)
    copy_paste = CopyPaste(0.7) if masks else None
    data = CocoDetection(
        *coloured, train=True, masks=masks, transform=transform, mosaic=Mosaic(0.7, side=70), copy_paste=copy_paste
    )
    num_boxes = 0
    for seed in range(40):
        picture, target = load(data, seed % NUM_IMAGES, seed)
        for box, label in zip(target["boxes"], target["labels"], strict=True):
            if (box[2:] - box[:2]).min() < 12:
                continue  # of a cut triangle, without a mask, there may be the box alone
            x1, y1, x2, y2 = box.round().int().tolist()
            inside = picture[:, y1:y2, x1:x2].flatten(1).int()
            differing = (inside - torch.tensor(colour_of(int(label)))[:, None]).abs().amax(dim=0)
            assert differing.min() <= 3
            num_boxes += 1
    assert num_boxes > 100


class Seeded(torch.utils.data.Dataset[Any]):
    def __init__(self, data: CocoDetection) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data.load(index, seed=100 + index)


def mixed_set(files: tuple[Path, Path], **arguments: Any) -> CocoDetection:
    transform = DetectionAugmentation((24, 40), 60, color_jitter=0.5)
    mixing = {"mosaic": Mosaic(0.5), "copy_paste": CopyPaste(0.5)}
    return CocoDetection(*files, train=True, masks=True, transform=transform, **(mixing | arguments))


def test_the_seed_alone_decides_whatever_the_workers(coloured: tuple[Path, Path]) -> None:
    alone = [mixed_set(coloured).load(index, seed=100 + index) for index in range(NUM_IMAGES)]
    loader = DataLoader(Seeded(mixed_set(coloured)), batch_size=None, num_workers=2)
    for ours, theirs in zip(alone, loader, strict=True):
        assert ours is not None
        assert same(ours, theirs)
    data = mixed_set(coloured)
    assert not same(load(data, 0, 1), load(data, 0, 2))
    assert not all(same(load(data, 0, None), load(data, 0, None)) for _ in range(5))


def test_an_image_that_is_not_mixed_is_as_without_mixing(coloured: tuple[Path, Path]) -> None:
    never = mixed_set(coloured, mosaic=Mosaic(0), copy_paste=CopyPaste(0))
    without = mixed_set(coloured, mosaic=None, copy_paste=None)
    for seed in range(5):
        assert same(load(never, seed, seed), load(without, seed, seed))


@pytest.mark.parametrize("name", ["mosaic", "copy_paste"])
def test_how_often_images_are_mixed(coloured: tuple[Path, Path], name: str) -> None:
    mixing: dict[str, Any] = {"mosaic": {"mosaic": Mosaic(0.3)}, "copy_paste": {"copy_paste": CopyPaste(0.3)}}
    data = CocoDetection(*coloured, train=True, masks=True, **mixing[name])
    plain = CocoDetection(*coloured, train=True, masks=True)[0]
    num_mixed = sum(not same(load(data, 0, seed), plain) for seed in range(400))
    # An eighth of the pasted objects are the image's own, in their places: nothing changes.
    expected = 400 * 0.3 * (1 if name == "mosaic" else 7 / 8)
    assert abs(num_mixed - expected) < 4 * (400 * 0.3 * 0.7) ** 0.5


@pytest.mark.parametrize("name", ["mosaic", "copy_paste"])
def test_unreadable_images_are_passed_over(coloured: tuple[Path, Path], name: str) -> None:
    mixing: dict[str, Any] = {"mosaic": {"mosaic": Mosaic(1)}, "copy_paste": {"copy_paste": CopyPaste(1)}}
    for image_id in range(2, NUM_IMAGES + 1):
        (coloured[0] / f"{image_id}.png").write_bytes(b"broken")
    data = CocoDetection(*coloured, train=True, masks=True, on_unreadable="skip", **mixing[name])
    with pytest.warns(UserWarning, match=r"skipped: cannot read the image .*\.png") as caught:
        targets = [load(data, 0, seed)[1] for seed in range(10)]
    for target in targets:
        assert set(target["labels"].tolist()) <= set(range(1, NUM_OBJECTS + 1))
    assert data.skipped == [f"{image_id}.png" for image_id in range(2, NUM_IMAGES + 1)]
    assert len([w for w in caught if issubclass(w.category, UserWarning)]) == NUM_IMAGES - 1
    assert data.load(1, seed=0) is None

    strict = CocoDetection(*coloured, train=True, masks=True, **mixing[name])
    with pytest.raises(ValueError, match=r"cannot read the image .*images/[2-8]\.png"):
        [strict.load(0, seed) for seed in range(10)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mosaic": MOSAIC}, "mosaic is given with train=False, but the ground truth of an evaluation is the file's"),
        ({"copy_paste": COPY_PASTE}, "copy_paste is given with train=False"),
    ],
)
def test_mixing_that_cannot_be(coloured: tuple[Path, Path], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        CocoDetection(*coloured, **arguments)


def test_copy_paste_gives_masks_only_where_they_are_asked_for(coloured: tuple[Path, Path]) -> None:
    with_masks, without = (
        CocoDetection(*coloured, train=True, masks=masks, transform=FLIPS, copy_paste=CopyPaste(1))
        for masks in (True, False)
    )
    for seed in range(4):
        picture, target = load(with_masks, seed, seed)
        same_picture, same_target = load(without, seed, seed)
        assert torch.equal(picture, same_picture)
        assert torch.equal(target.pop("boxes"), same_target.pop("boxes"))
        assert target.keys() - same_target.keys() == {"masks"}


def test_mixing_ends_where_no_other_image_can_be_read(
    coloured: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = mixed_set(coloured, mosaic=Mosaic(1), on_unreadable="skip")
    monkeypatch.setattr(coco, "read_rgb", unreadable_after_the_first(coco.read_rgb))
    with pytest.raises(ValueError, match=f"none of the {NUM_IMAGES} images can be read, such as .*jpg|png"):
        data.load(0, 1)


def unreadable_after_the_first(read: Callable[..., Any]) -> Callable[..., Any]:
    calls = itertools.count()

    def read_once(*arguments: Any) -> Any:
        if next(calls):
            raise UnreadableImageError("gone")
        return read(*arguments)

    return read_once


def test_real_images(real_data: Callable[[str], Path]) -> None:
    folder = real_data("coco_tiny")
    data = CocoDetection(
        folder / "train2017",
        folder / "annotations" / "instances_train2017.json",
        train=True,
        masks=True,
        transform=DetectionAugmentation((240, 320), 500),
        mosaic=Mosaic(0.5, side=640),
        copy_paste=CopyPaste(1),
    )
    for seed in range(8):
        picture, target = load(data, seed, seed)
        assert target["masks"].shape == (len(target["labels"]), *picture.shape[1:])
        assert target["masks"].any(dim=2).any(dim=1).all()
        assert (target["boxes"][:, 2:] - target["boxes"][:, :2] > 0).all()
        assert (target["area"] > 0).all()
