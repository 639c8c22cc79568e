"""Clocks, and what keeps comparisons by the clock fair."""
import pytest

import rstitch
from analysis.instruments import timing


def test_every_method_comes_first_equally_often():
    orders = [timing.rotated(["a", "b", "c"], i) for i in range(6)]
    assert orders[:3] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]] and orders[3:] == orders[:3]


def test_the_clock_runs_forward_in_seconds():
    first = timing.now()
    assert 0 <= timing.now() - first < 1


def test_the_reference_is_the_median_of_single_steps(monkeypatch):
    asked = []

    def measured(lm, points, repeats):
        asked.append((lm, points, repeats))
        return [rstitch.Sample(1, 64, ms) for ms in (3.0, 1.0, 2.0, 50.0, 2.5)]

    monkeypatch.setattr(rstitch, "measure_latency", measured)
    assert timing.reference_ms("an LM") == pytest.approx(2.5)
    assert asked == [("an LM", [(1, 64)], 9)]
