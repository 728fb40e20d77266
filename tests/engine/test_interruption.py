from __future__ import annotations

import os
import signal
import threading

import pytest

from resnest_det.engine import Interrupted, interruption
from resnest_det.engine.interruption import StopSignals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_request(number: signal.Signals) -> None:
    former = signal.getsignal(number)
    with StopSignals() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        assert stop.requested == number.name
        with pytest.raises(Interrupted, match=number.name), stop.at_once():
            raise AssertionError("a request that came before the block must not let it begin")
    assert signal.getsignal(number) is former


def test_a_signal_ends_a_block_in_which_all_is_saved() -> None:
    with StopSignals() as stop:
        went_on = False
        with pytest.raises(Interrupted, match="SIGTERM"), stop.at_once():  # noqa: PT012  # what follows is the point
            os.kill(os.getpid(), signal.SIGTERM)
            went_on = True
        assert not went_on
        assert stop.requested == "SIGTERM"


def test_ctrl_c_a_second_time_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes within two seconds is the first one, sent on by torchrun."""
    now = 100.0
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        now = 101.9
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGTERM"
        now = 102.1
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt) as error:
            os.kill(os.getpid(), signal.SIGINT)
        assert not isinstance(error.value, Interrupted)


def test_elsewhere_than_in_the_main_thread_nothing_changes() -> None:
    seen: list[object] = []

    def look() -> None:
        with StopSignals() as stop:
            seen.append((signal.getsignal(signal.SIGINT), stop.requested))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [(signal.getsignal(signal.SIGINT), None)]


def test_it_passes_by_handlers_of_exceptions() -> None:
    assert not issubclass(Interrupted, Exception)
