"""The machine's rates and the bound, beside what they are by hand."""

from __future__ import annotations

from itertools import count

import pytest

from resnest_det.deploy import roofline
from resnest_det.deploy.profiling import Operation
from resnest_det.deploy.roofline import Machine, least_seconds, measure_machine


def test_the_bound_is_the_longer_of_arithmetic_and_copying() -> None:
    machine = Machine(matmul=50.0, convolution=100.0, copy=10.0)
    bound_by_arithmetic, bound_by_copying = Operation(macs=500, moved=20), Operation(macs=100, moved=60)
    assert least_seconds([bound_by_arithmetic], machine) == 10
    assert least_seconds([bound_by_copying], machine) == 6
    assert least_seconds([bound_by_arithmetic, bound_by_copying], machine) == 16
    assert least_seconds([], machine) == 0


def test_rates_on_a_clock_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count()
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: next(clock))  # everything takes a second
    monkeypatch.setitem(roofline._MATRIX_SIDE, "cpu", 10)
    monkeypatch.setitem(roofline._COPIED_BYTES, "cpu", 400)
    monkeypatch.setattr(roofline, "_CONVOLUTIONS", ((2, 3, 4), (8, 1, 4)))
    machine = measure_machine()
    assert machine.matmul == 2 * 10**3
    assert machine.convolution == max(2 * 4 * 4**2 * 2**2 * 3**2, 2 * 4 * 4**2 * 8**2)
    assert machine.copy == 2 * 400
    assert machine.arithmetic == machine.convolution
