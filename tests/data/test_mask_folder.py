"""MaskFolder: which files belong together, what masks may hold, what is refused and in which words."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from resnest_det.data import MaskFolder, SegmentationAugmentation, eval_loader, train_loader

WIDTH, HEIGHT = 6, 4
NAMES = ["road", "tree", "sky"]
VALUES = np.array([[0, 1, 2, 255, 0, 0], [2, 2, 2, 2, 1, 1], [0, 0, 0, 0, 0, 0], [255, 1, 1, 1, 1, 2]], np.uint8)


def save(path: Path, picture: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def save_image(folder: Path, name: str, mode: str = "RGB", size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    save(folder / "images" / name, Image.new("RGB", size, (200, 100, 50)).convert(mode))


def save_mask(folder: Path, name: str, values: np.ndarray = VALUES) -> None:
    save(folder / "masks" / name, Image.fromarray(values))


def pair(folder: Path, stem: str = "a", values: np.ndarray = VALUES) -> None:
    save_image(folder, f"{stem}.png", size=values.shape[::-1])
    save_mask(folder, f"{stem}.png", values)


def read(folder: Path, class_names: Any = NAMES, **arguments: Any) -> MaskFolder:
    return MaskFolder(folder / "images", folder / "masks", class_names, **arguments)


# --- what it reads


def test_sample_holds_image_and_mask(tmp_path: Path) -> None:
    pair(tmp_path)
    data = read(tmp_path)
    image, mask = data[0]
    assert (image.dtype, image.shape, image.is_contiguous()) == (torch.uint8, (3, HEIGHT, WIDTH), True)
    assert image[:, 1, 2].tolist() == [200, 100, 50]
    assert (mask.dtype, mask.shape) == (torch.uint8, (HEIGHT, WIDTH))
    assert (mask.numpy() == VALUES).all()
    assert data.class_names == {0: "road", 1: "tree", 2: "sky"}
    assert data.num_classes == 3
    assert data.summary() == (
        f"{tmp_path / 'images'}: 1 images with masks; in the masks, the 3 classes are 0..2 and 255 is ignored."
    )


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_of_few_bits_is_the_index(bits: int, tmp_path: Path) -> None:
    """Pillow spreads such grey over 0..255, and writes none: the file is put together by hand."""
    values = np.array([[0, 1, 2, 1], [2, 2, 3, 0]], np.uint8)
    size = struct.pack(">II5B", 4, 2, bits, 0, 0, 0, 0)  # width, height, depth, grey
    lines = b"".join(
        b"\0" + int("".join(f"{value:0{bits}b}" for value in row), 2).to_bytes(4 * bits // 8) for row in values
    )
    chunks = [(b"IHDR", size), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    save_image(tmp_path, "a.png", size=(4, 2))
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
    )
    assert np.asarray(Image.open(tmp_path / "masks" / "a.png")).max() > 3
    _, mask = read(tmp_path, [*NAMES, "sea"])[0]
    assert (mask.numpy() == values).all()


def test_files_are_matched_by_path_without_suffix(tmp_path: Path) -> None:
    names = ["b.jpg", "A.JPEG", "sub/b.PNG", "c.v2.bmp", "d.webp", "sub/deep/e é.tif", "f.TIFF"]
    for name in names:
        save_image(tmp_path, name)
    for name in ["b.png", "A.PNG", "sub/b.tif", "c.v2.bmp", "d.tiff", "sub/deep/e é.png", "f.png"]:
        save_mask(tmp_path, name)
    for name in [".hidden.jpg", ".hidden/x.jpg", "notes.txt", "jpg"]:
        (tmp_path / "images" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_text("left alone")
    (tmp_path / "masks" / "b.xml").write_text("left alone")
    data = read(tmp_path)
    assert [data.file_name(index) for index in range(len(data))] == sorted(names)
    assert data.image_path(1) == tmp_path / "images" / "b.jpg"
    assert data.mask_path(1) == tmp_path / "masks" / "b.png"
    assert data.mask_path(-1) == tmp_path / "masks" / "sub" / "deep" / "e é.png"
    assert all((mask.numpy() == VALUES).all() for _, mask in data)
    with pytest.raises(IndexError, match="index 7 is outside this data set of 7 images"):
        data.mask_path(7)


def test_links_in_circles(tmp_path: Path) -> None:
    pair(tmp_path)
    for name in ("one", "two"):
        (tmp_path / "images" / name).symlink_to(tmp_path / "images")
    assert len(read(tmp_path)) == 1


def test_nothing_is_opened_before_it_is_asked_for(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_text("no picture")
    assert len(read(tmp_path)) == 1


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_grey_palette_and_rgba_images_become_rgb(tmp_path: Path, mode: str) -> None:
    save_mask(tmp_path, "a.png")
    picture = Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 255)).convert(mode if mode != "I;16" else "L")
    if mode == "I;16":
        picture = Image.fromarray(np.full((HEIGHT, WIDTH), 65535, np.uint16))
    save(tmp_path / "images" / "a.tif", picture)
    image = read(tmp_path)[0][0]
    assert image.shape == (3, HEIGHT, WIDTH)
    assert image.unique().tolist() == [255]


def test_one_pixel_image(tmp_path: Path) -> None:
    pair(tmp_path, values=np.array([[2]], np.uint8))
    image, mask = read(tmp_path)[0]
    assert image.shape == (3, 1, 1)
    assert mask.tolist() == [[2]]


def test_image_is_turned_by_exif_where_that_fits_the_mask(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    (tmp_path / "images").mkdir()
    for name, size in (("a.jpg", (WIDTH, HEIGHT)), ("b.jpg", (HEIGHT, WIDTH))):
        Image.new("RGB", size).save(tmp_path / "images" / name, exif=exif)
        save_mask(tmp_path, name.replace("jpg", "png"))
    assert [image.shape for image, _ in read(tmp_path)] == [(3, HEIGHT, WIDTH)] * 2


# --- what masks may hold


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_palette_mask_counts_by_index_not_by_colour(tmp_path: Path, suffix: str) -> None:
    save_image(tmp_path, "a.png")
    mask = Image.fromarray(VALUES).convert("L")
    mask.putpalette([7, 7, 7] * 256)  # one colour for all
    assert mask.mode == "P"
    save(tmp_path / "masks" / f"a.{suffix}", mask)
    assert (read(tmp_path)[0][1].numpy() == VALUES).all()


def test_mask_of_one_bit(tmp_path: Path) -> None:
    save_image(tmp_path, "a.png")
    save_mask(tmp_path, "a.png", VALUES == 1)
    assert (read(tmp_path)[0][1].numpy() == (VALUES == 1)).all()


@pytest.mark.parametrize(("suffix", "dtype"), [("png", np.uint16), ("tif", np.uint16), ("tif", np.int32)])
def test_wide_masks(tmp_path: Path, suffix: str, dtype: Any) -> None:
    save_image(tmp_path, "a.png")
    save_mask(tmp_path, f"a.{suffix}", np.where(VALUES == 255, 65535, VALUES.astype(int) + 1000).astype(dtype))
    data = read(tmp_path, first_class_value=1000, ignore_value=65535)
    assert (data[0][1].numpy() == VALUES).all()
    message = "holds values that are no class: 1000, 1001, 1002, 65535; the 3 classes are 0..2 and 255 is ignored"
    with pytest.raises(ValueError, match=message):
        read(tmp_path)[0]


@pytest.mark.parametrize("value", [-1, 65536, 2**31 - 1])
def test_value_beyond_16_bits(tmp_path: Path, value: int) -> None:
    save_image(tmp_path, "a.png")
    save_mask(tmp_path, "a.tif", np.where(VALUES == 255, value, VALUES.astype(np.int32)).astype(np.int32))
    with pytest.raises(ValueError, match=rf"a\.tif holds values that are no class: {value};"):
        read(tmp_path)[0]


def test_first_class_value_and_ignore_value(tmp_path: Path) -> None:
    pair(tmp_path, values=VALUES + np.uint8(1))  # 255 has become 0
    assert (read(tmp_path, first_class_value=1, ignore_value=0)[0][1].numpy() == VALUES).all()


def test_ignoring_nothing(tmp_path: Path) -> None:
    values = np.arange(254, dtype=np.uint8)[None]
    pair(tmp_path, values=values)
    data = read(tmp_path, [str(value) for value in values[0]], ignore_value=None)
    assert data[0][1].tolist() == values.tolist()
    assert data.summary().endswith("the 254 classes are 0..253 and nothing is ignored.")


@pytest.mark.parametrize(
    ("values", "arguments", "message"),
    [
        ([0, 7, 3], {}, "3, 7; the 3 classes are 0..2 and 255 is ignored; correct the mask or the class list"),
        ([0, 254], {}, "254; the 3 classes are 0..2"),
        (
            [0, 255],
            {"ignore_value": None},
            "255; the 3 classes are 0..2 and nothing is ignored; where 255 means not labelled, use ignore_value=255",
        ),
        (
            [1, 255],
            {"first_class_value": 1, "ignore_value": 0},
            "255; the 3 classes are 1..3 and 0 is ignored; where 255 means not labelled, write 0 instead",
        ),
        (
            [0, 1],
            {"first_class_value": 1},
            "0; the 3 classes are 1..3 and 255 is ignored; where 0 is the first class, use first_class_value=0; where "
            "it is none, ignore_value=0",
        ),
        (
            [1, 2, 3],
            {},
            "3; the 3 classes are 0..2 and 255 is ignored; where the first class is 1 in the masks, use "
            "first_class_value=1",
        ),
        (range(3, 12), {}, "3, 4, 5, 6, 7 and 4 more;"),
    ],
)
def test_value_beyond_the_classes(tmp_path: Path, values: Any, arguments: dict[str, Any], message: str) -> None:
    pair(tmp_path, values=np.array([list(values)], np.uint8))
    data = read(tmp_path, on_unreadable="skip", **arguments)  # readable, and wrong: never skipped
    message = f"{tmp_path / 'masks' / 'a.png'} holds values that are no class: {message}"
    with pytest.raises(ValueError, match=re.escape(message)):
        data.load(0)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "CMYK", "F"])
def test_rgb_mask_where_an_index_is_expected(tmp_path: Path, mode: str) -> None:
    save_image(tmp_path, "a.png")
    save(
        tmp_path / "masks" / "a.tif",
        Image.new("L", (WIDTH, HEIGHT)).convert("RGB" if mode == "CMYK" else mode).convert(mode),
    )
    data = read(tmp_path, on_unreadable="skip")
    with pytest.raises(
        ValueError, match=rf"a\.tif is a picture of mode {mode}, but a mask holds one class index a pixel"
    ):
        data.load(0)


def test_mask_of_another_size_than_its_image(tmp_path: Path) -> None:
    save_image(tmp_path, "a.png", size=(20, 10))
    save_mask(tmp_path, "a.png")
    data = read(tmp_path, on_unreadable="skip")
    message = rf"masks/a\.png is {WIDTH} x {HEIGHT} pixels, but its image .*images/a\.png is 20 x 10"
    with pytest.raises(ValueError, match=message):
        data.load(0)


# --- files that cannot be read


def break_file(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 3, (HEIGHT * 9, WIDTH * 9), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(("folder", "kind"), [("images", "image"), ("masks", "mask")])
def test_unreadable_image_or_mask(tmp_path: Path, folder: str, kind: str) -> None:
    pair(tmp_path, "a")
    pair(tmp_path, "b")
    path = tmp_path / folder / "b.png"
    break_file(path)
    with pytest.raises(ValueError, match=rf"cannot read the {kind} {path} \(OSError: .*truncated"):
        read(tmp_path).load(1)

    data = read(tmp_path, on_unreadable="skip")
    with pytest.warns(UserWarning, match=rf"skipped: cannot read the {kind} {path}") as caught:
        assert [data.load(index) is None for index in (0, 1, 1)] == [False, True, True]
    assert len(caught) == 1
    assert data.skipped == ["b.png"]


def test_unknown_on_unreadable(tmp_path: Path) -> None:
    pair(tmp_path)
    with pytest.raises(ValueError, match="on_unreadable='ignore' is unknown"):
        read(tmp_path, on_unreadable="ignore")


# --- files that do not belong together


def test_image_without_mask_and_mask_without_image(tmp_path: Path) -> None:
    pair(tmp_path, "good")
    for place in range(7):
        save_image(tmp_path, f"{place}.jpg")
    save_mask(tmp_path, "0_mask.png")
    (tmp_path / "masks" / "1.jpg").touch()
    with pytest.raises(FileNotFoundError) as raised:
        read(tmp_path)
    message = str(raised.value)
    assert (
        f"7 of 8 images have no mask in {tmp_path / 'masks'}: 0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg and 2 more" in message
    )
    assert f"1 of 2 masks have no image in {tmp_path / 'images'}: 0_mask.png" in message
    assert "have the same path but for the suffix (a mask's is .png, .bmp, .tif, .tiff)" in message


def test_image_without_mask(tmp_path: Path) -> None:
    pair(tmp_path, "good")
    save_image(tmp_path, "sub/good.jpg")
    with pytest.raises(FileNotFoundError, match=r"^1 of 2 images have no mask in .*: sub/good\.jpg\. An image"):
        read(tmp_path)


def test_mask_without_image(tmp_path: Path) -> None:
    pair(tmp_path, "good")
    save_mask(tmp_path, "other.png")
    with pytest.raises(FileNotFoundError, match=r"^1 of 2 masks have no image in .*: other\.png\. An image"):
        read(tmp_path)


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_two_files_of_one_name(tmp_path: Path, folder: str) -> None:
    pair(tmp_path, "a")
    save_mask(tmp_path, "a.tif")
    if folder == "images":
        save_image(tmp_path, "a.tif")
    message = rf"{folder} has 1 names with more than one file: a\.png, a\.tif; keep one of each"
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(("missing", "kind"), [("images", "image"), ("masks", "mask")])
def test_missing_folder(tmp_path: Path, missing: str, kind: str) -> None:
    other = "masks" if missing == "images" else "images"
    (tmp_path / other).mkdir()
    message = f"the {kind} folder {tmp_path / missing} does not exist; {tmp_path} holds the folders {other}"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        read(tmp_path)


def test_folder_without_images(tmp_path: Path) -> None:
    pair(tmp_path)
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"images holds no images; they end in \.jpg, \.jpeg, \.png"):
        read(tmp_path)


def test_one_folder_for_both(tmp_path: Path) -> None:
    pair(tmp_path)
    with pytest.raises(ValueError, match="images and masks are one folder"):
        MaskFolder(tmp_path / "images", tmp_path / "masks" / ".." / "images", NAMES)


# --- wrong arguments


@pytest.mark.parametrize(
    ("class_names", "arguments", "message"),
    [
        ([], {}, "class_names has 0 names; it needs 1 to 254"),
        ([str(i) for i in range(255)], {}, "class_names has 255 names; it needs 1 to 254"),
        ("road", {}, "class_names='road' is one string"),
        (["road", " ", ""], {}, "class_names has empty names at the places 1, 2"),
        (["road", "tree", "road"], {}, "class_names has names more than once: road"),
        (NAMES, {"first_class_value": -1}, "first_class_value=-1 puts 3 classes at -1..1"),
        (NAMES, {"first_class_value": 65534}, "first_class_value=65534 puts 3 classes at 65534..65536"),
        (NAMES, {"ignore_value": 65536}, "ignore_value=65536 is outside 0..65535"),
        (NAMES, {"ignore_value": -1}, "ignore_value=-1 is outside 0..65535"),
        (NAMES, {"ignore_value": 0}, "ignore_value=0 is a class's value too: 3 classes from first_class_value=0 on"),
    ],
)
def test_wrong_class_list_or_values(tmp_path: Path, class_names: Any, arguments: dict[str, Any], message: str) -> None:
    pair(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path, class_names, **arguments)


# --- transform, workers


def test_transform_gets_image_mask_and_seed(tmp_path: Path) -> None:
    pair(tmp_path)

    def transform(image: np.ndarray, mask: np.ndarray, seed: int | None) -> tuple[np.ndarray, np.ndarray]:
        return image[::-1, :3] + np.uint8(seed or 0), mask[::-1, :3]

    data = read(tmp_path, transform=transform)
    sample = data.load(0, seed=4)
    assert sample is not None
    assert sample[0].shape == (3, HEIGHT, 3)
    assert sample[0][:, 0, 0].tolist() == [204, 104, 54]
    assert (sample[1].numpy() == VALUES[::-1, :3]).all()
    assert data[0][0][:, 0, 0].tolist() == [200, 100, 50]  # seed None


@pytest.fixture
def noisy(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for place in range(7):
        height, width = rng.integers(10, 40, 2)
        save(tmp_path / "images" / f"{place}.png", Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)))
        save_mask(tmp_path, f"{place}.png", rng.choice(np.array([0, 1, 2, 255], np.uint8), (height, width)))
    return tmp_path


def epochs(folder: Path, num_workers: int) -> list[list[Any]]:
    data = read(folder, transform=SegmentationAugmentation(24, vertical_flip=0.5, color_jitter=0.5))
    loader = train_loader(data, batch_size=3, num_workers=num_workers, seed=5, group_by_aspect=False)
    batches = []
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        batches.append([(torch.stack(images), torch.stack(masks), names) for images, masks, names in loader])
    return batches


def test_any_number_of_workers_yields_the_same_batches(noisy: Path) -> None:
    alone, two = epochs(noisy, 0), epochs(noisy, 2)
    assert [len(epoch) for epoch in alone] == [2, 2]
    assert alone[0][0][2] != alone[1][0][2]
    for ours, theirs in zip(alone[0] + alone[1], two[0] + two[1], strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
        assert ours[2] == theirs[2]


def test_evaluation_yields_every_image_at_its_own_size(noisy: Path) -> None:
    data = read(noisy)
    batches = list(eval_loader(data, batch_size=3, num_workers=0))
    assert [name for _, _, names in batches for name in names] == [f"{place}.png" for place in range(7)]
    loaded = [pair for images, masks, _ in batches for pair in zip(images, masks, strict=True)]
    for (image, mask), (expected_image, expected_mask) in zip(loaded, data, strict=True):
        assert torch.equal(image, expected_image)
        assert torch.equal(mask, expected_mask)


def test_skipped_masks_of_workers_are_seen_by_the_main_process(noisy: Path) -> None:
    break_file(noisy / "masks" / "2.png")
    break_file(noisy / "images" / "5.png")
    data = read(noisy, on_unreadable="skip")
    batches = list(eval_loader(data, batch_size=3, num_workers=2))
    assert [len(names) for _, _, names in batches] == [2, 2, 1]
    assert data.skipped == ["2.png", "5.png"]


class _Shared(torch.utils.data.Dataset[list[bool]]):
    """Answers, from inside a worker, which of the data set's tensors lie in shared memory."""

    def __init__(self, data: MaskFolder) -> None:
        self.data = data

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> list[bool]:
        return [value.is_shared() for value in vars(self.data).values() if isinstance(value, torch.Tensor)]


def _only(samples: list[list[bool]]) -> list[bool]:
    return samples[0]


@pytest.mark.slow
def test_spawned_workers_share_the_names(noisy: Path) -> None:
    data = read(noisy, transform=SegmentationAugmentation(24))
    loader = DataLoader(_Shared(data), num_workers=1, multiprocessing_context="spawn", collate_fn=_only)
    assert next(iter(loader)) == [True] * 5  # names and offsets of images and masks, skipped
