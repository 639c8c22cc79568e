"""Answers timed side by side: what is timed is what was asked for, a kill loses one, ratios by hand."""
import pytest

from analysis import answers, clock
from analysis.instruments.rows import RESULTS, read_rows
from analysis.instruments.stats import with_interval
from analysis.instruments.task import Task

WAYS = ["llm", "slm", "tau=0.005", "generate", "assisted"]


def test_every_way_writes_its_own_answer_and_a_kill_loses_one(tmp_path):
    """Three problems; the file is cut inside its eighth row, and the second run times what lacks."""
    task, path = Task(max_new_tokens=60), tmp_path / "clock.jsonl"
    rows = clock.run(task, WAYS, "dev", 3, path)
    assert [(r["problem"], r["method"]) for r in rows[:7]] == [*((0, way) for way in WAYS),
                                                              (1, "slm"), (1, "tau=0.005")]  # in turn
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:7]) + lines[7][:30])
    again = clock.run(task, WAYS, "dev", 3, path)
    assert len(read_rows(path)) == 15 and [r["ms"] for r in again[:7]] == [r["ms"] for r in rows[:7]]
    assert all(r["ms"] > 0 and r["reference_ms"] > 0 for r in again)
    own = answers.run(task, ["llm", "slm", "tau=0.005"], "dev", 3, tmp_path / "answers.jsonl")
    told = {(r["method"], r["problem"]): (len(r["tokens"]), r["correct"], r["writer"].count("L"))
            for r in own}
    for r in rows:
        alone = r["method"] in ("generate", "assisted")  # both write what the LLM writes
        n, right, large = told["llm" if alone else r["method"], r["problem"]]
        assert (r["tokens"], r["correct"]) == (n, right)
        assert r["llm_share"] == (None if r["method"] == "assisted" else pytest.approx(large / n, abs=1e-4))


def test_speed_is_shorter_times_cheaper_by_hand():
    """LLM: 100 ms for 10 tokens and 300 ms for 30; the other: 50 ms for 8 and 50 ms for 12. Speed 400 / 100 =
    4; shorter 40 / 20 = 2; cheaper (400 / 40) / (100 / 20) = 10 / 5 = 2. A third problem has no LLM."""
    made = {"dtype": "float32", "machine": "m", "threads": 1, "correct": True, "reference_ms": 2.0}
    rows = [{"method": name, "problem": i, "ms": ms, "tokens": n, "llm_share": 0.5, **made}
            for name, i, ms, n in (("llm", 0, 100, 10), ("llm", 1, 300, 30), ("x", 0, 50, 8),
                                   ("x", 1, 50, 12), ("x", 2, 9000, 9))]
    assert {part: of[0] for part, of in clock.compared(rows, "x").items()} == pytest.approx(
        {"speed": 4.0, "shorter": 2.0, "cheaper": 2.0})
    assert clock.compared(rows, "llm")["speed"] == (1.0, 1.0, 1.0)
    assert "LLM alone = 1" in clock.show(rows, ["llm", "x"]) and "+0 %" in clock.show(rows, ["llm", "x"])


def test_the_results_page_shows_the_committed_times():
    rows, page = read_rows(RESULTS / "real" / "clock.jsonl"), (RESULTS / "real" / "README.md").read_text()
    names = {"SLM alone": "slm", "R-Stitch, tau 0.02": "tau=0.02", "R-Stitch, tau 0.05": "tau=0.05",
             "speculative decoding": "assisted"}
    lines = page.split("## By the clock")[1].split("\n## ")[0].splitlines()
    cells = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| ")}
    for name, method in names.items():
        x = clock.compared(rows, method)
        shown = (with_interval(x[part], " x", 2) for part in ("speed", "shorter", "cheaper"))
        assert cells[name].endswith(" | " + " | ".join(shown) + " |")
    told = clock.show(rows, list(dict.fromkeys(row["method"] for row in rows)))
    assert "tau=0.02 is 1.24 [1.14, 1.35] times as fast as speculative decoding" in told
    assert "1.24 times as fast as speculative decoding [1.14, 1.35], at 0.05 1.44 times [1.34, 1.55]" in page
    assert "-8 to +40 % over the run" in told


@pytest.mark.parametrize("options, told", [
    (["--methods", "slow"], "--methods slow: expected"),
    (["--methods", "llm", "llm"], "expected each once"),
    (["--n", "0"], "--n"), ([], "--out is missing")])
def test_what_cannot_be_timed_is_told_first(options, told, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["clock", *options])
    monkeypatch.setattr(Task, "load", None)  # nothing is loaded
    with pytest.raises(SystemExit) as ended:
        clock.main()
    assert ended.value.code == 2 and told in capsys.readouterr().err
