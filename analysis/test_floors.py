"""How far a step is from what the machine can do."""
import pytest

from analysis import floors
from analysis.instruments.shapes import SHAPES, Limits


def test_rows_of_a_small_shape_say_what_was_measured():
    rows = list(floors.rows_of("mini-S", [1, 2], 20, Limits(1e10, 1e10), "cpu", "float32", 2))
    assert [(r["batch"], r["context"]) for r in rows] == [(1, 20), (2, 20)] and "mini-S" in SHAPES
    assert all(r["of_floor"] == pytest.approx(r["floor_ms"] / r["step_ms"]) for r in rows)
    assert "floor / step" in floors.show(rows[0])
