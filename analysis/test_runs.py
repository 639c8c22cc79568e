"""Runs that go on after a kill."""
import json

import pytest

from analysis.instruments.rows import append_row, newest
from analysis.instruments.runs import Rows, settle


def square(x: int) -> dict:
    return {"x": x, "y": x * x}


def test_a_row_is_computed_once_and_anew_where_it_was_made_with_something_else(tmp_path):
    path, made = tmp_path / "rows.jsonl", {"made_with": "a"}
    store = Rows(path, lambda row: row["x"], lambda key: made)
    assert store.fill({x: (square, x) for x in (2, 3)}, 1, "")[3] == {"x": 3, "y": 9, "made_with": "a"}
    before = path.read_bytes()
    assert store.missing([2, 3, 4]) == [4]
    assert store.fill({2: (pytest.fail, "computed again")}, 1, "").keys() == {2, 3}
    assert path.read_bytes() == before
    made["made_with"] = "b"
    assert store.have() == {} and store.missing([3]) == [3]
    store.fill({3: (square, 3)}, 1, "")
    assert path.read_bytes().startswith(before) and store.have() == {3: {"x": 3, "y": 9, "made_with": "b"}}
    append_row(path, {"x": 3, "y": 10, "made_with": "b"})
    assert store.have()[3]["y"] == 10  # the last one counts
    assert newest(path, x=3, made_with="a")["y"] == 9 and newest(path, x=5) is None


def test_a_folder_keeps_to_what_it_was_made_with(tmp_path):
    made, asked = {"config": {"a": 1, "pair": (2, 3)}, "slm": "f"}, []
    first = lambda: asked.append(1) or {"ms": 5.0}
    for _ in range(2):  # a tuple is a list once it is read back
        known = settle(tmp_path / "run", made, "a run", first=first)
        assert known == {"config": {"a": 1, "pair": [2, 3]}, "slm": "f", "ms": 5.0} and asked == [1]
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == known
    with pytest.raises(ValueError,
                       match=r"run holds a run of other config: expected \{'a': 1\}, got \{'a': 2\}; take"):
        settle(tmp_path / "run", made | {"config": made["config"] | {"a": 2}}, "a run")
    with pytest.raises(ValueError, match="holds a run of other slm: expected f, got g"):
        settle(tmp_path / "run", made | {"slm": "g"}, "a run")
