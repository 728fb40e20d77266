"""What the data sets share: pictures of every mode, what was skipped, and what is said of missing paths."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from resnest_det.data.files import ImageFiles, UnreadableImageError, describe_near, pack_names, read_rgb, unpack_name


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "CMYK", "1", "I;16", "I"])
@pytest.mark.parametrize(("value", "expected"), [(255, 255), (0, 0)])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, value: int, expected: int) -> None:
    path = tmp_path / ("x.tif" if mode in ("CMYK", "I") else "x.png")
    if mode.startswith("I"):
        wide = np.full((3, 4), value * 257, np.uint16 if mode == "I;16" else np.int32)
        Image.fromarray(wide).save(path)
    else:
        Image.new("RGB", (4, 3), (value,) * 3).convert(mode).save(path)
    with Image.open(path) as file:
        assert file.mode == mode
    pixels = read_rgb(path, 4, 3)
    assert (pixels.shape, pixels.dtype) == ((3, 4, 3), np.uint8)
    assert np.unique(pixels).tolist() == [expected]


def test_16_bit_grey_keeps_its_tones(tmp_path: Path) -> None:
    """Pillow alone would make everything above 255 white."""
    Image.fromarray(np.array([[0, 255, 256, 32768, 65535]], np.uint16)).save(tmp_path / "x.png")
    assert read_rgb(tmp_path / "x.png", 5, 1)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_picture_is_turned_only_where_its_size_is_another(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 3)).save(tmp_path / "x.jpg", exif=exif)
    assert read_rgb(tmp_path / "x.jpg", 4, 3).shape == (3, 4, 3)
    assert read_rgb(tmp_path / "x.jpg", 3, 4).shape == (4, 3, 3)


def test_missing_file_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImageError, match=r"cannot read the image .*x\.jpg \(FileNotFoundError"):
        read_rgb(tmp_path / "x.jpg", 1, 1)


def test_names_come_back(tmp_path: Path) -> None:
    names = ["a/bĉ 1.png", "", os.fsdecode(b"\xff.png")]
    characters, offsets = pack_names(names)
    spans = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    assert [unpack_name(characters[first:last]) for first, last in spans] == names


class Unreadable(ImageFiles[int]):
    def _load(self, index: int, seed: int | None) -> int:
        raise UnreadableImageError(f"cannot read {self.file_name(index)}")


def pickled(data: Unreadable, file: Path) -> Unreadable:
    return pickle.loads(pickle.dumps(data))


def mapped(data: Unreadable, file: Path) -> Unreadable:
    torch.save(data, file)
    return torch.load(file, mmap=True, weights_only=False)


@pytest.mark.parametrize("copy", [pickled, mapped])
def test_a_copy_has_skipped_flags_of_its_own_shared_with_its_workers(copy: Any, tmp_path: Path) -> None:
    data = Unreadable(tmp_path, ["a.png", "b.png"], on_unreadable="skip")
    other = copy(data, tmp_path / "data.pt")
    worker = multiprocessing.get_context("fork").Process(target=other.load, args=(1,))
    worker.start()
    worker.join()
    assert (data.skipped, other.skipped) == ([], ["b.png"])


def test_near_a_missing_path(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "a.json").touch()
    missing = tmp_path / "images" / "train"
    assert describe_near(missing, "") == f"{tmp_path} holds the folders pictures"
    assert describe_near(missing, ".json") == f"{tmp_path} holds the .json files a.json"
    assert describe_near(missing, ".txt") == f"{tmp_path} holds no .txt files"


def test_near_a_path_of_which_nothing_exists() -> None:
    assert describe_near(Path("/no such folder/coco/train"), "") == "there is no folder /no such folder"
    assert describe_near(Path("/no such folder"), "") == "check the path"
    assert describe_near(Path("/"), ".json") == "check the path"
