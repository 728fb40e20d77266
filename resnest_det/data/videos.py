"""Videos as frames: read one after the other, and written as MP4."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import cv2
import numpy as np
from numpy.typing import NDArray

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")

_UNKNOWN_RATE = 25.0  # frames a second of a video that does not say
_CODEC = "mp4v"  # MPEG-4 Part 2: the one for MP4 that OpenCV brings along everywhere
_LOWEST_RATE, _HIGHEST_RATE = 0.01, 65535  # that the codec holds: a fraction whose parts have 16 bits


class UnreadableVideoError(ValueError):
    """A video file no frame of which can be decoded."""


class VideoReader:
    """The frames of a video, one after the other, as RGB arrays (H, W, 3), turned as the file says.

    Args:
        path: the file, of whatever format OpenCV's FFmpeg decodes.

    Raises:
        UnreadableVideoError: there is no frame to be read.

    Attributes:
        size: height and width of the first frame.
        frames_per_second: as the file says; 25 where it does not.
        num_frames: as the file says, or 0; that many need not come.
    """

    def __init__(self, path: Path) -> None:
        self._capture = cv2.VideoCapture(str(path))
        self._first = self._read()
        if self._first is None:
            self._capture.release()
            raise UnreadableVideoError(f"cannot read the video {path}: OpenCV finds no frame that it can decode in it")
        self.size: tuple[int, int] = self._first.shape[0], self._first.shape[1]
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.frames_per_second = rate if math.isfinite(rate) and rate > 0 else _UNKNOWN_RATE
        self.num_frames = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        frame, self._first = self._first, None
        while frame is not None:
            yield frame
            frame = self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._capture.release()

    def _read(self) -> NDArray[np.uint8] | None:
        success, frame = self._capture.read()
        return np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8) if success else None


class VideoWriter:
    """An MP4 file of pictures, all shown at the size of the first; of an odd side the last pixels are left out.

    A side of one pixel is shown as two.

    Args:
        path: the file, whose folder must exist.
        frames_per_second: above 0. Written is the nearest rate with up to three decimals that the codec holds.
    """

    def __init__(self, path: Path, frames_per_second: float) -> None:
        self._path, self._rate = path, _rounded_rate(frames_per_second)
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)  # width, height

    def write(self, picture: NDArray[np.uint8]) -> None:
        """Add a picture, RGB (H, W, 3).

        Raises:
            OSError: the file cannot be written.
        """
        if self._writer is None:
            self._size = max(2, picture.shape[1]), max(2, picture.shape[0])
            self._writer = cv2.VideoWriter(str(self._path), cv2.VideoWriter.fourcc(*_CODEC), self._rate, self._size)
            if not self._writer.isOpened():
                self._writer = None
                raise OSError(
                    f"the video {self._path} of {self._size[0]} x {self._size[1]} pixels and {self._rate:g} frames a "
                    f"second cannot be written"
                )
        if picture.shape[1::-1] != self._size:  # OpenCV would leave it out, and say nothing
            picture = np.asarray(cv2.resize(picture, self._size, interpolation=cv2.INTER_AREA), np.uint8)
        self._writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.release()


def _rounded_rate(rate: float) -> float:
    """The rate with as many decimals, at most three, as OpenCV's decimal fraction of it has room for in the codec."""
    rate = min(max(rate, _LOWEST_RATE), _HIGHEST_RATE)
    decimals = next(number for number in (3, 2, 1, 0) if round(rate * 10**number) <= _HIGHEST_RATE)
    return round(rate, decimals)
