"""Signals that ask a run to stop: noticed between two steps, so that nothing is left half done."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

_PATIENCE = 2.0  # seconds


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run, and all of it is saved. Like a KeyboardInterrupt, it passes by `except Exception`.

    Args:
        reason: the signal, and after which step.

    Attributes:
        run_folder: what can be resumed, where it is known.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.run_folder: Path | None = None


class StopSignals:
    """Within its `with` block, SIGINT (Ctrl-C) and SIGTERM are requests, to be asked for by `requested`.

    A second SIGINT, two seconds later or more, stops at once, as a KeyboardInterrupt: torchrun sends on what its
    processes got from the terminal already. Outside of the main thread, where Python cannot handle signals, nothing is
    changed.

    Attributes:
        requested: the name of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._first_at = math.inf
        self._at_once = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that a request ends at once, by Interrupted, because all is saved; one that came before does too."""
        self._at_once = True
        try:
            if self.requested:
                raise Interrupted(self.requested)
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.requested = self.requested or signal.Signals(number).name
        self._first_at = min(self._first_at, time.monotonic())
        if self._at_once:
            raise Interrupted(self.requested)
        if number == signal.SIGINT and time.monotonic() - self._first_at >= _PATIENCE:
            raise KeyboardInterrupt
