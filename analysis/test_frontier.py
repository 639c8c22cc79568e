"""Learned routers against fixed rules."""
import dataclasses
import json

import numpy as np
import pytest

import rstitch
from analysis import frontier, train_policy
from analysis.conftest import MODELS_MS, timed
from analysis.instruments.task import Task, solve
from analysis.pocket.domain import problems

POLICIES = Task().path("policies")


def test_rows_of_other_weights_or_times_are_computed_anew(tmp_path):
    task = Task(policies=str(tmp_path))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "policy.safetensors").write_bytes(b"a")
    (tmp_path / "one" / "made.json").write_text("{}")
    policy, fixed = frontier.made_with(task, "policy", "one"), frontier.made_with(task, "fixed", "tau 0.02")
    (tmp_path / "one" / "policy.safetensors").write_bytes(b"b")
    assert frontier.made_with(task, "policy", "one") != policy
    policy = frontier.made_with(task, "policy", "one")
    (tmp_path / "one" / "made.json").write_text('{"thresholds": {"call": 0.7}}')
    assert frontier.made_with(task, "policy", "one") != policy
    assert frontier.made_with(task, "fixed", "tau 0.02") == fixed
    assert frontier.made_with(timed(tmp_path, policies=str(tmp_path)), "fixed", "tau 0.02") != fixed
    assert frontier.made_with(dataclasses.replace(task, max_new_tokens=9), "fixed", "tau 0.02") != fixed


def test_a_policy_is_calibrated_by_what_it_earns(tmp_path, pocket, monkeypatch):
    """Above -30 the LLM is called wherever the policy is asked, as R-Stitch does; above 30 nowhere. Which
    earns more decides."""
    monkeypatch.setattr(frontier, "ABOVE", (-30.0, 30.0))
    monkeypatch.setattr(frontier, "N_CALIBRATION", 12)
    task, todo = timed(tmp_path), problems("calibration", 12, 0)
    lam = json.loads((task.path("policies") / frontier.BASE / "made.json").read_text())["lam"]
    row = frontier.calibrated_row(task, frontier.BASE, 3)
    earned = [train_policy.Price(lam, MODELS_MS, 128)(solve(pocket, todo, router))[0].mean()
              for router in (rstitch.EntropyRouter(0.02), rstitch.SLMOnly())]
    assert [point[1] for point in row["curve"]] == pytest.approx(earned) and earned[0] != earned[1]
    assert row["above"] == (-30.0, 30.0)[int(np.argmax(earned))]
    assert (row["kind"], row["n"]) == ("calibrated", 3)


def test_ablations_compare_on_the_same_problems():
    llm = [[1, 400.0]] * 4
    base, changed = [[1, 100.0], [0, 50.0], [1, 100.0], [1, 110.0]], [[1, 80.0], [0, 50.0], [0, 40.0],
                                                                      [1, 90.0]]
    rows = [{"kind": "policy", "name": name, "outcomes": outcomes}
            for name, outcomes in ((frontier.BASE, base), ("hand-back", changed))]
    text = frontier.ablations([*rows, {"kind": "fixed", "name": "LLM alone", "outcomes": llm}])
    # right: -1 of 4; ms: (-20 + 0 - 60 - 20) / 4. Reward at kappa 0.35, 0.000875 a ms: + 0.0175, 0, - 0.9125,
    # + 0.0175, in all - 0.8775
    assert "| hand-back | kappa0.35-seed0 | 0.35 | 50.0 | 65.0 | -25.0 [-75.0, +0.0] | -25.0 [" in text
    assert "| -21.9 [" in text
    assert "no-context" not in text  # it has no row here


def rows_with(**outcomes) -> list[dict]:
    """Rows of frontier.jsonl: fixed rules, and policies by their names."""
    rows = []
    for name, o in outcomes.items():
        name = name.replace("_alone", " alone")
        kind = "fixed" if name.endswith("alone") else "policy"
        rows.append({"kind": kind, "name": name, "outcomes": o, "accuracy": float(np.mean([x[0] for x in o])),
                     "llm_share": 0.1, "tokens": 9.0, "latency_ms": float(np.mean([x[-1] for x in o]))})
        if kind == "policy":
            rows.append(rows[-1] | {"kind": "random", "outcomes": [[0, *o[0][1:]], *o[1:]]})
    return rows


def test_recipes_and_their_gaps_by_fit_and_by_clock():
    """Fixed rules at 50 % in 100 ms and 100 % in 300 ms, so that mixtures have 75 % in 200 ms. The policies,
    75 % right: fitted 150 and 170 ms, gaps of 1 - 150 / 200 = 25 and 15 %, 20 % on average; without mixtures
    the frontier is the same line. The first four problems are timed, where they take 140 and 160 ms as
    fitted: 30 and 20 %. By the clock all take 20 ms more but the LLM, 50 more: 75 % in (120 + 350) / 2 = 235,
    1 - 160 / 235 = 31.9 and 1 - 180 / 235 = 23.4 %, 27.7 % on average. Labels at every token: all right in
    120 ms, 1 - 120 / 300 = 60 %."""
    small, large = [[1, 9, 0, 100.0], [0, 9, 0, 100.0]] * 4, [[1, 9, 9, 300.0]] * 8
    ours = [[[right, 9, 1, ms] for ms in (first, later) for right in (1, 1, 1, 0)]
            for first, later in ((140.0, 160.0), (160.0, 180.0))]
    names = ["labels-kappa0.1-seed0", "labels-kappa0.1-seed1"]
    rows = rows_with(SLM_alone=small, LLM_alone=large, **dict(zip(names, ours)))
    times = {"SLM alone": 120.0, "LLM alone": 350.0, names[0]: 160.0, names[1]: 180.0}
    wall = {"kind": "wall-clock", "name": "wall-clock", "n": 4, "ms": {name: [ms] * 4
                                                                       for name, ms in times.items()}}
    live = {"kind": "live labels", "n": 8, "accuracy": 1.0, "llm_share": 0.05, "tokens": 9.0,
            "latency_ms": 120.0, "outcomes": [[1, 9, 1, 120.0]] * 8}
    older = live | {"n": 3, "latency_ms": 90.0, "outcomes": [[1, 9, 1, 90.0]] * 3}
    text = frontier.recipes([*rows, wall], [older, live, {"kind": "router times"}])
    cells, labels = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()
                     if line.startswith(("| from labels", "| labels")))
    assert cells[:5] == ["from labels, kappa 0.1", "75.0, 75.0", "10.0", "9.0", "160.0"]
    assert cells[5].startswith("+12.5 ")  # random calls are right once less often, of 8
    assert cells[6].startswith("+20.0 [") and cells[7].startswith("+20.0 [")
    assert cells[8].startswith("+27.7 [") and cells[9].startswith("+25.0 [")
    assert labels[1:6] == ["100.0", "5.0", "9.0", "120.0", ""] and labels[8:] == ["", ""]
    assert labels[6] == labels[7] == "+60.0 [+60.0, +60.0]"
    assert frontier.timed_gaps(rows, names) == ["", ""]  # nothing was timed
    del wall["ms"][names[1]]
    assert frontier.timed_gaps([*rows, wall], names) == ["", ""]  # one seed only was


def test_the_gap_against_r2r_has_the_time_of_its_net():
    """R2R: 75 % in 150 ms, and 10 decisions of 5 ms; ours 75 % in 150 ms: 1 - 150 / 200 = 25 %."""
    ours = [[1, 9, 1, 150.0], [1, 9, 1, 150.0], [1, 9, 1, 150.0], [0, 9, 1, 150.0]] * 2
    rows = rows_with(**{"labels-kappa0.35-seed0": ours})
    older = [[1, 9, 1, 1.0]] * 8
    r2r = {"kind": "test", "family": "R2R", "asked": 10.0, "n": 8}
    compared = [r2r | {"outcomes": older, "made_with": "an older net"},
                r2r | {"outcomes": ours, "made_with": "the net"},
                {"kind": "router times", "ms": {"R2R": 5.0}}]
    assert "| from labels, kappa 0.35 | +25.0 [" in frontier.against_r2r(rows, compared)
    assert frontier.against_r2r(rows, []) == "" == frontier.against_r2r([], compared)


def test_the_time_of_nets_counts_where_a_policy_was_trained_with_it(tmp_path, monkeypatch):
    """Two policies alike, the second trained with the time of its nets: 7 ms a decision here, taken once,
    side by side. When that time is taken anew, its row is made anew, the other stays."""
    task, asked = timed(tmp_path, policies=str(tmp_path / "p"), out=str(tmp_path)), []
    base = POLICIES / frontier.BASE
    for name, more in (("free", {}), ("paid", {"nets_ms": {"call": 1.0}, "thresholds": {"call": 0.5}})):
        (tmp_path / "p" / name).mkdir(parents=True)
        (tmp_path / "p" / name / "policy.safetensors").write_bytes((base / "policy.safetensors").read_bytes())
        made = json.loads((base / "made.json").read_text()) | more
        (tmp_path / "p" / name / "made.json").write_text(json.dumps(made))
    form = frontier.form_of(task, "paid")
    monkeypatch.setattr(frontier, "FIXED", {"SLM alone": rstitch.SLMOnly()})
    monkeypatch.setattr(frontier, "ABOVE", (0.0,))
    monkeypatch.setattr(frontier, "N_CALIBRATION", 2)
    monkeypatch.setattr(frontier, "decision_ms",
                        lambda task, routers, n: asked.append(list(routers)) or {form: {"call": 7.0}})
    rows = {(r["kind"], r["name"]): r for r in frontier.run(task, 6, 0, 1)}
    assert asked == [[form]] and ("calibrated", "paid") not in rows and ("calibrated", "free") in rows
    free, paid = rows["policy", "free"], rows["policy", "paid"]
    assert free["asked"] == paid["asked"] > 0 and (free["nets_ms"], paid["nets_ms"]) == (None, {"call": 7.0})
    assert paid["latency_ms"] == pytest.approx(free["latency_ms"] + 7 * free["asked"], abs=0.02)
    frontier.run(task, 6, 0, 1)
    assert asked == [[form]]  # all is there
    lines = [json.loads(line) for line in (tmp_path / "frontier.jsonl").read_text().splitlines()]
    lines = [r | {"ms": {form: {"call": 9.0}}} if r["kind"] == "router times" else r for r in lines]
    (tmp_path / "frontier.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    other = json.loads((tmp_path / "p" / "paid" / "made.json").read_text())
    other["config"]["seed"] = 5
    (tmp_path / "p" / "other").mkdir()
    (tmp_path / "p" / "other" / "made.json").write_text(json.dumps(other))
    (tmp_path / "p" / "other" / "policy.safetensors").write_bytes((base / "policy.safetensors").read_bytes())
    again = {(r["kind"], r["name"]): r for r in frontier.run(task, 6, 0, 1)}
    assert again["policy", "free"] == free and asked == [[form]]  # one more of a form: its time is known
    assert again["policy", "other"]["nets_ms"] == {"call": 9.0}
    assert again["policy", "paid"]["latency_ms"] == pytest.approx(free["latency_ms"] + 9 * free["asked"],
                                                                  abs=0.02)


def test_methods_are_timed_again_only_where_one_of_them_has_changed(tmp_path, monkeypatch):
    """An ablation that comes later is not timed, so it does not spoil what was; new weights do."""
    task, times = timed(tmp_path, policies=str(tmp_path / "p"), out=str(tmp_path)), []
    base = POLICIES / frontier.BASE

    def policy(name: str) -> None:
        (tmp_path / "p" / name).mkdir(parents=True)
        for file in ("policy.safetensors", "made.json"):
            (tmp_path / "p" / name / file).write_bytes((base / file).read_bytes())

    monkeypatch.setattr(frontier, "FIXED", {"SLM alone": rstitch.SLMOnly(), "LLM alone": rstitch.LLMOnly()})
    monkeypatch.setattr(frontier, "ABOVE", (0.0,))
    monkeypatch.setattr(frontier, "N_CALIBRATION", 2)
    monkeypatch.setattr(frontier, "timed_row", lambda task, names, n: times.append(names) or {
        "kind": "wall-clock", "name": "wall-clock", "ms": {}})
    policy("a-seed0")
    frontier.run(task, 3, 2, 1)
    assert times == [["SLM alone", "LLM alone", "a-seed0"]]
    policy("ablation")
    frontier.run(task, 3, 2, 1)
    assert len(times) == 1
    made = json.loads((base / "made.json").read_text()) | {"thresholds": {"call": 0.9}}
    (tmp_path / "p" / "a-seed0" / "made.json").write_text(json.dumps(made))
    frontier.run(task, 3, 2, 1)
    assert len(times) == 2
