"""read_rgb: OpenCV decodes ordinary JPEG files, and nobody could tell from the pixels or the errors."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from resnest_det.data.files import UnreadableImageError, read_rgb


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Smooth and noisy, of odd sides, so that blocks and subsampled colours end at the edge."""
    rng = np.random.default_rng(0)
    smooth = cv2.resize(rng.integers(0, 256, (7, 9, 3), np.uint8), (117, 83), interpolation=cv2.INTER_CUBIC)
    return Image.fromarray(np.clip(smooth + rng.normal(0, 9, smooth.shape), 0, 255).astype(np.uint8))


def jpeg(picture: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", **options)
    return stream.getvalue()


@pytest.fixture
def decoded_by_opencv(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the images that OpenCV decoded."""
    sizes: list[int] = []
    imdecode = cv2.imdecode

    def counted(content: np.ndarray, flags: int) -> np.ndarray:
        image = imdecode(content, flags)
        sizes.append(image.size)
        return image

    monkeypatch.setattr(cv2, "imdecode", counted)
    return sizes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quality": 30},
        {"subsampling": 0, "quality": 95},
        {"subsampling": 1},
        {"optimize": True, "restart_marker_blocks": 3},
        {"keep_rgb": True},
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_pillows(
    tmp_path: Path, picture: Image.Image, mode: str, options: dict[str, Any], decoded_by_opencv: list[int]
) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(jpeg(picture.convert(mode), **options))
    pixels = read_rgb(path, *picture.size)
    assert decoded_by_opencv == [pixels.size]
    assert pixels.flags.c_contiguous
    assert pixels.dtype == np.uint8
    assert (pixels == np.array(Image.open(path).convert("RGB"))).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_of_the_expected_size_is_not_turned(
    tmp_path: Path, picture: Image.Image, orientation: int, decoded_by_opencv: list[int]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "x.jpg"
    path.write_bytes(jpeg(picture, exif=exif))
    assert (read_rgb(path, *picture.size) == np.array(Image.open(path))).all()
    assert len(decoded_by_opencv) == 1


@pytest.mark.parametrize("kind", ["CMYK", "PNG", "progressive", "another size", "bytes behind it"])
def test_the_rest_is_pillows_own(tmp_path: Path, picture: Image.Image, kind: str, decoded_by_opencv: list[int]) -> None:
    path = tmp_path / "x"
    if kind == "PNG":
        picture.save(path, "PNG")
    else:
        content = jpeg(picture.convert("CMYK" if kind == "CMYK" else "RGB"), progressive=kind == "progressive")
        path.write_bytes(content + b"\0\0" if kind == "bytes behind it" else content)
    size = (1, 1) if kind == "another size" else picture.size
    assert (read_rgb(path, *size) == np.array(Image.open(path).convert("RGB"))).all()
    assert not decoded_by_opencv


def test_jpeg_that_was_cut_off_is_refused(tmp_path: Path, picture: Image.Image) -> None:
    """OpenCV by itself would fill it up."""
    content, path = jpeg(picture), tmp_path / "x.jpg"
    for end in range(len(content) // 2, len(content) - 2, 97):
        path.write_bytes(content[:end])
        with pytest.raises(UnreadableImageError, match=r"cannot read the image .*x\.jpg \(OSError: .*truncated"):
            read_rgb(path, *picture.size)


def test_damaged_jpeg_is_read_or_refused_as_pillow_does(tmp_path: Path, picture: Image.Image) -> None:
    content, path = jpeg(picture), tmp_path / "x.jpg"
    rng, num_refused = np.random.default_rng(0), 0
    for _ in range(200):
        damaged = bytearray(content)
        for place in rng.integers(2, len(content) - 2, 3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            expected = np.array(Image.open(path).convert("RGB"))
        except Exception:
            num_refused += 1
            with pytest.raises(UnreadableImageError, match="cannot read the image"):
                read_rgb(path, *picture.size)
        else:
            assert (read_rgb(path, *picture.size) == expected).all()
    assert 0 < num_refused < 200


def test_photographs(real_data: Callable[[str], Path]) -> None:
    for path in sorted((real_data("coco_tiny") / "train2017").iterdir()):
        expected = np.array(Image.open(path).convert("RGB"))
        assert (read_rgb(path, expected.shape[1], expected.shape[0]) == expected).all()
