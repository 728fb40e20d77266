from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from resnest_det.data.videos import UnreadableVideoError, VideoReader, VideoWriter


def frame(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Red on the left, and on the right a blue that rises from frame to frame."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, : width // 2, 0] = 220
    picture[:, width // 2 :, 2] = 40 * number
    return picture


def test_what_is_written_is_read(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "clip.mp4", 12.5) as writer:
        for number in range(6):
            writer.write(frame(number))
    with VideoReader(tmp_path / "clip.mp4") as reader:
        assert reader.frames_per_second == pytest.approx(12.5)
        assert reader.num_frames == 6
        read = list(reader)
    assert len(read) == 6
    for number, picture in enumerate(read):
        assert picture.dtype == np.uint8
        assert picture.shape == (48, 64, 3)
        assert np.abs(picture.astype(int) - frame(number)).mean() < 8  # of the codec, not of swapped colours


def test_pictures_of_another_size_are_resized(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "clip.mp4", 10) as writer:
        for size in ((48, 64), (24, 32), (96, 64)):
            writer.write(frame(3, *size))
    with VideoReader(tmp_path / "clip.mp4") as reader:
        assert [picture.shape for picture in reader] == [(48, 64, 3)] * 3


def test_of_an_odd_side_the_last_pixels_are_left_out(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "clip.mp4", 10) as writer:
        writer.write(frame(3, 49, 65))
    with VideoReader(tmp_path / "clip.mp4") as reader:
        assert [picture.shape for picture in reader] == [(48, 64, 3)]


@pytest.mark.parametrize("rate", [119.8734, 66.1234, 59.94006, 23.976, 30000 / 1001, 0.002, 0.3333, 1000.7, 90000])
def test_rates_are_rounded_to_what_the_codec_holds(rate: float, tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "clip.mp4", rate) as writer:
        for number in range(3):
            writer.write(frame(number))
    with VideoReader(tmp_path / "clip.mp4") as reader:
        assert reader.frames_per_second == pytest.approx(min(max(rate, 0.01), 65535), rel=1e-2)
        assert len(list(reader)) == 3


def test_a_pixel_is_shown_as_two(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "clip.mp4", 10) as writer:
        writer.write(frame(3, 1, 1))
    with VideoReader(tmp_path / "clip.mp4") as reader:
        assert reader.size == (2, 2)
        assert [picture.shape for picture in reader] == [(2, 2, 3)]


def test_nothing_written_leaves_no_file(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "clip.mp4", 10):
        pass
    assert not (tmp_path / "clip.mp4").exists()


def test_unreadable_and_unwritable(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("text.mp4", "missing.mp4"):
        with pytest.raises(UnreadableVideoError, match=rf"cannot read the video {tmp_path / name}: OpenCV finds no fr"):
            VideoReader(tmp_path / name)
    with (
        VideoWriter(tmp_path / "nowhere" / "clip.mp4", 10) as writer,
        pytest.raises(OSError, match=r"clip\.mp4 of 64 x 48 pixels and 10 frames a second cannot be written"),
    ):
        writer.write(frame(0))
