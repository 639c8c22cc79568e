"""The fitted latency model."""
import dataclasses
import json

import numpy as np
import pytest

import rstitch
from analysis import latency
from analysis.instruments.problems import question
from analysis.instruments.task import Task, encode_problems, load_latency
from analysis.pocket.domain import problems
from analysis.pocket.weights import MAX_NEW_TOKENS

PLAN = latency.Plan(330, rounds=2, problems=3, repeats=2, contexts=3, held_out=6, length=20)


def prompts(n: int, seed: int = 0) -> list:
    return [encode_problems(Task().load()[2], [problem])[0] for problem in problems("dev", n, seed)]


def store_at(path, plan=PLAN, asked=None):
    return latency.samples_file(Task(), plan, asked or prompts(5), path, seed=0)


def test_latency_is_fitted_checked_and_read_back(tmp_path, pocket):
    done = latency.measure(pocket, prompts(3), PLAN, store_at(tmp_path / "s.jsonl"))
    assert list(done) == list(PLAN.jobs())
    held = {(j, method) for j, method in latency.trajectories(done) if j % 2}
    assert held == {(1, method) for method in latency.METHODS}  # of three problems the second
    row = latency.evaluate(done) | {"seed": 0, "device": "cpu", "dtype": "float32", "torch": "x",
                                    "machine": "m", "threads": 1, "length": 40}
    (tmp_path / "latency.json").write_text(json.dumps(row))
    slm, llm = load_latency(tmp_path / "latency.json")
    assert slm.coefficients == {k: tuple(v) for k, v in row["slm"].items()}
    assert llm.decode(50) > slm.decode(50) > 0
    latency.plot(row, tmp_path / "latency.png")
    assert (tmp_path / "latency.png").stat().st_size > 10_000
    assert all(name in latency.show(row) for name in latency.METHODS)
    assert row["all_trajectories"]["n"] == len(held)
    assert "6 held-out trajectories in all" in latency.show(row)


def test_a_killed_run_goes_on_with_the_first_time_that_is_missing(tmp_path, pocket, monkeypatch):
    path = tmp_path / "s.jsonl"
    whole = latency.measure(pocket, prompts(3), PLAN, store_at(path))
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == len(whole)
    path.write_text("".join(lines[:-20]) + lines[-20][:15])  # torn in the middle of a row
    taken = []
    monkeypatch.setattr(latency, "answered", lambda *args: taken.append(args[2]) or whole[
        ("trajectory", 2, args[2], 0)])
    again = latency.measure(pocket, prompts(3), PLAN, store_at(path))
    lost = list(whole)[-20:]
    assert list(again) == list(whole) and taken == [key[2] for key in lost if key[0] == "trajectory"]
    kept = list(whole)[:-20]
    assert {key: again[key]["ms"] for key in kept} == {key: whole[key]["ms"] for key in kept}
    assert path.read_text().count("\n") == len(lines)


def test_when_the_minutes_are_over_two_problems_are_answered_and_a_later_run_adds_others(tmp_path, pocket):
    plan = latency.Plan(330, 1, 5, repeats=1, longest_read=64, contexts=3, held_out=12)
    chosen, store = prompts(5), store_at(tmp_path / "s.jsonl", plan)
    done = latency.measure(pocket, chosen, plan, store, minutes=1e-9)
    assert {j for j, _ in latency.trajectories(done)} == {0, 1}
    assert done[("length",)]["tokens"] == latency.LENGTHS[0]
    assert all(len(runs[0]["calls"]) >= 16 for runs in latency.trajectories(done).values())
    more = latency.measure(pocket, chosen, plan, store, minutes=60)
    assert {j for j, _ in latency.trajectories(more)} == {0, 1, 2, 3, 4}
    assert {key: more[key]["spent"] for key in done} == {key: row["spent"] for key, row in done.items()}
    assert more[("length",)]["tokens"] == latency.LENGTHS[0]  # settled by the first run
    assert latency.evaluate(done)["all_trajectories"]["n"] == 6


def test_times_of_another_length_or_prompt_are_passed_over(tmp_path):
    path = tmp_path / "s.jsonl"
    for key in (("grid", "slm", 0, 1, 0), ("trajectory", 0, "SLM alone", 0),
                ("trajectory", 1, "SLM alone", 0)):
        store_at(path).add(key, {"key": list(key), "ms": 1.0})
    assert len(store_at(path).have()) == 3
    longer = store_at(path, dataclasses.replace(PLAN, length=41)).have()
    others = store_at(path, asked=prompts(1) + prompts(4, 8)).have()
    assert [key[:2] for key in longer] == [("grid", "slm")]
    assert [key[:2] for key in others] == [("grid", "slm"), ("trajectory", 0)]


def test_affordable_length_by_hand(monkeypatch):
    """The grid took 60 of 300 s; steps of 100 and 300 ms: 0.75 x 240,000 / (4 x 6 x 400) = 18.75."""
    monkeypatch.setattr(latency, "METHODS", dict.fromkeys("abcdef"))
    done = {("grid", "slm", 0, 1, 0): {"ms": 100, "spent": 20},
            ("grid", "llm", 0, 1, 0): {"ms": 300, "spent": 20},
            ("grid", "llm", 0, 64, 0): {"ms": 900, "spent": 10},
            ("held out", "slm", 0, 2, 1): {"ms": 1, "spent": 10},
            ("reference", 0, "before"): {"ms": 300, "spent": 99}}
    assert latency.affordable_length(done, 5) == 18
    assert latency.affordable_length(done, 0.5) == 16 and latency.affordable_length(done, 500) == 128


def test_another_pairs_plan_is_short_and_minutes_stand_alone(tmp_path):
    options = latency.build_parser().parse_args
    *_, plan, minutes = latency.prepare(options(["--minutes", "2"]))
    assert minutes == 2 and plan == latency.Plan(384, 1, 40, 1, 128, 3, 12, None)
    *_, plan, minutes = latency.prepare(options(["--per-round", "3"]))
    assert minutes == float("inf") and plan == latency.Plan(384, 10, 30, length=MAX_NEW_TOKENS)
    rows = "".join(json.dumps({"question": question(p), "answer": str(p.answer), "split": "dev"}) + "\n"
                   for p in problems("dev", 3, 0))
    (tmp_path / "p.jsonl").write_text(rows)
    other = ["--problems", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "x.json")]
    _, asked, plan, minutes = latency.prepare(options(other))
    longest = max(ids.shape[1] for ids in asked)
    assert minutes == 15 and plan == latency.Plan(longest + 512, 1, 3, 1, 128, 3, 12, None)
    (tmp_path / "p.jsonl").write_text(rows.splitlines(keepends=True)[0])
    for argv, message in ((other, "has 1 problem: expected two or more"),
                          (["--overhead", "--minutes", "3"], "--overhead goes with none of --minutes"),
                          (["--out", str(tmp_path / "Qwen2.5-1.5B")], "expected a name that ends in .json")):
        with pytest.raises(ValueError, match=message):
            latency.prepare(options(argv))
    for wrong in (["--minutes", "3", "--rounds", "2"], ["--minutes", "0"], ["--minutes", "nan"]):
        with pytest.raises(ValueError, match="--minutes .*: expected more than 0, and neither --rounds nor"):
            latency.prepare(options(wrong))


def test_overhead_names_its_parts(pocket):
    row = latency.overhead(pocket, repeats=2, tokens=5)
    assert 0 < row["entropy"]["ms"] < row["step, entropy rule"]["ms"]
    assert row["forward"]["ms"] < row["step, policy asked"]["ms"]
    assert row["loop, per token"]["share"] == 1 and row["loop_ms"] > 0


def test_held_out_points_are_not_those_of_the_profile_and_all_fit():
    profile, held = latency.grid_points(384), latency.held_out_points(384)
    assert all(n + kv <= 384 for n, kv in profile + held) and len(set(held) & set(profile)) <= 1
    assert {n == 1 for n, _ in held} == {True, False}


def test_reads_of_the_grid_are_no_longer_than_asked():
    points = latency.grid_points(600, longest_read=128, contexts=3)
    assert max(n for n, _ in points) == 128 and max(n + kv for n, kv in points) == 600
    assert sum(n == 1 for n, _ in points) == 9 and sum(n == 128 for n, _ in points) == 3
    assert max(n for n, _ in latency.held_out_points(600, 12, longest_read=128)) <= 128


def test_steps_of_a_trajectory_by_hand():
    """From result to result 2 and 3 ms, then 1 and 7: the second step took 1.5 ms, the third 5."""
    calls = [[rstitch.SLM, 10, 0], [rstitch.SLM, 1, 10], [rstitch.LLM, 11, 0]]
    steps = latency.step_samples([{"calls": calls, "steps": [2.0, 3.0]},
                                  {"calls": calls, "steps": [1.0, 7.0]}])
    assert steps == {"slm": [(1, 10, 1.5)], "llm": [(11, 0, 5.0)]}


def test_drift_by_hand():
    done = {("reference", 0, "before"): {"ms": 10.0}, ("reference", 0, "after"): {"ms": 11.0},
            ("reference", 1, "before"): {"ms": 10.0}, ("reference", 1, "after"): {"ms": 10.0}}
    assert latency.drift_of(done) == (10.0, {0: pytest.approx(0.1), 1: 0.0})


def test_trajectory_figures_by_hand():
    # measured is 1.2 x fitted
    figures = latency.trajectory_figures(np.array([1.0, 2.0, 3.0]), np.array([1.2, 2.4, 3.6]))
    assert figures["factor"] == pytest.approx(1.2)
    assert figures["median_error"] == pytest.approx(1 / 6)  # 1 / 1.2 - 1
    assert figures["r2_after_factor"] == pytest.approx(1)
    assert figures["median_error_after_factor"] == pytest.approx(0)
    # residuals 0.2, 0.4, 0.6: squares 0.56; measured about its mean 2.4: 1.44 + 0 + 1.44 = 2.88; R^2 = 1 -
    # 0.56 / 2.88
    assert figures["r2"] == pytest.approx(1 - 0.56 / 2.88)
