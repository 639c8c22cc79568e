"""Problems of data sets, in the forms of those in use, read from small local ones by the package datasets."""
import json

import pytest

from analysis.instruments.hub import LETTERS, data_set, gold_of
from analysis.instruments.problems import Stated, content_of, read_problems, split_of, verify
from analysis.instruments.task import Task

FORMS = {
    "gsm8k": ({"question": "What is 3 times 406?", "answer": "3 * 406 = <<3*406=1218>>1218\n#### 1,218"},
              "1,218", "\\boxed{1218}"),
    "math500": ({"problem": "Convert $(0,3)$.", "solution": "so $\\boxed{7}$",
                 "answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "level": 2},
                "\\left( 3, \\frac{\\pi}{2} \\right)", "\\boxed{(3, \\pi/2)}"),
    "aime": ({"ID": "2024-I-1", "Problem": "Every morning ...", "Solution": "long", "Answer": 204},
             "204", "\\boxed{204}"),
    "aime_boxed": ({"id": 1, "problem": "Every ...", "solution": "\\boxed{073}"}, "073", "\\boxed{73}"),
    "amc": ({"id": 0, "problem": "Cities A and B ...", "answer": 142.0, "url": "x"}, "142", "\\boxed{142}"),
    "minerva": ({"problem": "Find the radius.", "solution": "It is $\\boxed{6.4e-3}$ cm.", "type": "x"},
                "6.4e-3", "\\boxed{0.0064}"),
    "olympiad": ({"question": "Solve it.", "final_answer": ["$3$", "$-3$"], "is_multiple_answer": True},
                 "$3$, $-3$", "\\boxed{-3, 3}"),
}


def saved(folder, part, rows):
    folder.mkdir(exist_ok=True)
    (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What datasets makes of the files stays in the test's folder."""
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("form", FORMS)
def test_questions_and_golds_of_the_forms_in_use(tmp_path, form):
    row, gold, right = FORMS[form]
    source = saved(tmp_path / form, "test", [row])
    problem, = read_problems(f"{source}::test", "question", "answer")
    assert problem == {"question": row.get("question") or row.get("problem") or row.get("Problem"),
                       "answer": gold, "split": "test"}
    task = Task(problems=source)
    assert task.split("test", 9) == [Stated(problem["question"], gold)]
    assert verify(task.split("test", 9)[0], right)
    assert not verify(task.split("test", 9)[0], "\\boxed{77}")


def test_multiple_choice_hides_the_right_answer_among_four(tmp_path):
    rows = [{"Question": f"Which one of {i}?", "Correct Answer": "right", "Incorrect Answer 1": "a",
             "Incorrect Answer 2": "b", "Incorrect Answer 3": "c"} for i in range(40)]
    found = read_problems(saved(tmp_path / "gpqa", "train", rows))
    assert {row["answer"] for row in found} == set(LETTERS)
    for row in found:
        assert f"({row['answer']}) right\n" in row["question"] and row["question"].count("\n(") == 4
        other = LETTERS[LETTERS.index(row["answer"]) - 1]
        problem = Stated(row["question"], row["answer"])
        for text in ("{}", "({})", "\\text{{{}}}", "\\text{{({})}}"):
            assert verify(problem, f"so \\boxed{{{text.format(row['answer'])}}}."), text
            assert not verify(problem, f"so \\boxed{{{text.format(other)}}}."), text


@pytest.mark.parametrize("value, gold", [
    ("2 + 2 #### x #### 4", "4"), ("so \\boxed{1} or \\boxed{2}", "1, 2"), (3.5, "3.5"), (12.0, "12"),
    (7, "7"), (["1"], "1"), (None, ""), ("", ""), ("\\boxed{", "")])
def test_gold_by_hand(value, gold):
    assert gold_of(value) == gold


def test_parts_become_splits(tmp_path):
    rows = [{"question": f"What is {i}?", "answer": str(i)} for i in range(200)]
    source = saved(tmp_path / "both", "train", rows)
    alone = read_problems(source)
    assert [split_of(row) for row in alone] == [split_of(row) for row in rows]  # as those of a file
    data_set.cache_clear()
    saved(tmp_path / "both", "test", rows[:5])
    found = read_problems(source)
    assert [row["question"] for row in found if row["split"] == "test"] == [r["question"] for r in rows[:5]]
    shares = {name: sum(row["split"] == name for row in found)
              for name in ("router-train", "dev", "calibration")}
    assert sum(shares.values()) == 200 and shares["router-train"] > 120 and min(shares.values()) > 8
    assert len(content_of(source)) > 205 * 20 and content_of(source) != content_of(f"{source}::test")


@pytest.mark.parametrize("rows, wrong, message", [
    ([{"question": "x", "answer": "1"}, {"question": "y", "answer": None}], "", "row 2 of test has no gold"),
    ([{"question": "Prove it.", "final_answer": None, "solution": ["Since 2 is even."]}], "",
     "row 1 of test has no gold"),
    ([{"text": "x", "answer": "1"}], "", "row 1 of test has no question: expected one in a column que"),
    ([{"question": "x", "answer": "1"}], "::dev", "no such file, and no data set that can be loaded"),
    ([{"question": "x", "answer": "1"}], "-none:main", "no such file, and no data set that can be loaded"),
    ([{"question": "x", "answer": "1"}], "::test:x", "expected a file, or a data set as REPO:CONFIG:PART")])
def test_what_is_no_data_set_of_problems_is_told(tmp_path, monkeypatch, rows, wrong, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = saved(tmp_path / "set", "test", rows) + wrong
    with pytest.raises(ValueError, match=f"--problems .*{message}"):
        read_problems(source)


def test_without_the_package_one_is_told_of_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"expected the package datasets \(pip install datasets\)"):
        data_set("openai/gsm8k:main:train")
