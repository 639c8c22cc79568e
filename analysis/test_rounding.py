"""How many answers rounding turns."""
import pytest

from analysis import rounding
from analysis.instruments.rows import read_rows
from analysis.instruments.task import Task
from analysis.presentation import figures, real
from analysis.test_arrows import ROOT


def test_differences_by_hand():
    """Of three answers the second differs at token 1, the third where the shorter one ends, at token 2."""
    rows = [{"method": "m", "batch": batch, "problem": i, "tokens": tokens}
            for batch, answers in ((1, [[4, 5], [4, 5, 6], [7, 8]]), (3, [[4, 5], [4, 9, 6], [7, 8, 9]]))
            for i, tokens in enumerate(answers)]
    found, = rounding.compare(rows)
    assert found["differ"][0] == pytest.approx(2 / 3) and found["n"] == 3 and found["batch"] == 3
    assert found["first"] == 1.5 and found["tokens"] == 7
    assert "66.7 [20.8, 93.9] % of 3 answers differ between batch 1 and 3, first at" in rounding.show(found)
    same, = rounding.compare([row for row in rows if row["problem"] == 0])
    assert same["first"] is None and "first at token" not in rounding.show(same)


def test_the_whole_answers_of_the_real_pair_differ_as_the_pages_say():
    slots = real.world_of(figures.load_real())["tau=0.02"]
    batch = read_rows(figures.results("real/batch32.jsonl"))
    found, = rounding.compare([{"method": "m", "batch": size, "problem": r["problem"], "tokens": r["tokens"]}
                               for size, rows in ((1, batch), (64, slots)) for r in rows])
    share, low, high = (100 * x for x in found["differ"])
    assert found["n"] == 32 and found["first"] == 52
    page, serving = ((ROOT / name).read_text() for name in ("analysis/results/README.md", "SERVING.md"))
    assert f"13 differ, {share:.0f} % [{low:.0f}, {high:.0f}], from token 3 to 286 on (median 52)" in page
    assert f"answers of 300 tokens | 32 | 32, and 64 slots | {share:.0f} [{low:.0f}, {high:.0f}] |" in serving


def test_what_was_answered_is_not_answered_again(tmp_path, monkeypatch):
    task, methods, path = Task(max_new_tokens=8), ["SLM alone", "R-Stitch, tau 0.02"], tmp_path / "r.jsonl"
    rows = rounding.run(task, methods, 3, path)
    assert {(row["method"], row["batch"], row["problem"]) for row in rows} == {
        (method, batch, i) for method in methods for batch in (1, 3) for i in range(3)}
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    again, own = [], rounding.answer
    monkeypatch.setattr(rounding, "answer", lambda *args: again.append(args[1]) or own(*args))
    assert rounding.run(task, methods, 3, path) == read_rows(path) and again == [methods[1]]
    assert len(path.read_text().splitlines()) == len(lines)
