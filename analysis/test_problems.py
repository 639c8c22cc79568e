"""Problems of a user's file."""
import json

import pytest

from analysis.instruments.problems import PARTS, Stated, question, split_of, spread, verify
from analysis.instruments.task import Task


def test_problems_of_a_file_are_split_and_graded(tmp_path):
    rows = [{"question": f"what is {i} halves?", "answer": f"\\frac{{{i}}}{{2}}"} for i in range(40)]
    rows[7]["split"] = "test"
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Task(problems=str(tmp_path / "p.jsonl"))
    parts = {name: task.split(name, 99) for name in ("router-train", "dev", "calibration", "test")}
    assert sorted(p.question for part in parts.values()
                  for p in part) == sorted(row["question"] for row in rows)
    assert Stated("what is 7 halves?", "\\frac{7}{2}") in parts["test"]
    assert len(parts["router-train"]) > 20
    assert task.split("router-train", 2) == parts["router-train"][:2]
    assert question(parts["test"][0]) == parts["test"][0].question
    assert verify(Stated("?", "\\frac{7}{2}"), "it is \\boxed{3.5}")
    assert not verify(Stated("?", "\\frac{7}{2}"), "it is \\boxed{3}")
    (tmp_path / "one.jsonl").write_text(json.dumps(rows[7]) + "\n")
    with pytest.raises(ValueError, match="has no problem in its dev split"):
        Task(problems=str(tmp_path / "one.jsonl")).split("dev", 1)
    with pytest.raises(ValueError, match="line 1 has split 'train': expected"):
        (tmp_path / "one.jsonl").write_text(json.dumps(rows[7] | {"split": "train"}) + "\n")
        Task(problems=str(tmp_path / "one.jsonl")).split("test", 1)


def test_a_split_follows_from_the_question_alone():
    """70, 10, 10 and 10 %; of the first 90 % the same, without test."""
    asked = [f"How many are {i}?" for i in range(2000)]
    shares = {part: sum(spread(one) == part for one in asked) / 2000 for part in PARTS}
    assert shares == pytest.approx(dict(zip(PARTS, (0.7, 0.1, 0.1, 0.1))), abs=0.025)
    assert {spread(one, 90) for one in asked} == set(PARTS[:3])
    assert split_of({"question": asked[0]}) == spread(asked[0])
    assert split_of({"question": asked[0], "split": "dev"}) == "dev"
