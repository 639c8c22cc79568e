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


def test_rows_of_other_weights_or_times_are_computed_anew(tmp_path):
    task = Task(policies=str(tmp_path))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "policy.safetensors").write_bytes(b"a")
    policy, fixed = frontier.made_with(task, "policy", "one"), frontier.made_with(task, "fixed", "tau 0.02")
    (tmp_path / "one" / "policy.safetensors").write_bytes(b"b")
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
        name = name.replace("_", " ") if name in ("SLM_alone", "LLM_alone") else name.replace("__", "-")
        kind = "fixed" if name.endswith("alone") else "policy"
        rows.append({"kind": kind, "name": name, "outcomes": o, "accuracy": float(np.mean([x[0] for x in o])),
                     "llm_share": 0.1, "tokens": 9.0, "latency_ms": float(np.mean([x[-1] for x in o]))})
        if kind == "policy":
            rows.append(rows[-1] | {"kind": "random"})
    return rows


def test_recipes_and_their_gaps_by_fit_and_by_clock():
    """Fixed rules at 50 % in 100 ms and 100 % in 300 ms, so that mixtures have 75 % in 200 ms. The policy, 75
    % right: fitted 150 ms, a gap of 1 - 150 / 200 = 25 %; without mixtures the frontier is the same line. By
    the clock all take 10 ms more but the LLM, 50 more: 75 % in (110 + 350) / 2 = 230, 1 - 160 / 230 = 30.4
    %."""
    small, large = [[1, 9, 0, 100.0], [0, 9, 0, 100.0]] * 4, [[1, 9, 9, 300.0]] * 8
    ours = [[1, 9, 1, 150.0], [1, 9, 1, 150.0], [1, 9, 1, 150.0], [0, 9, 1, 150.0]] * 2
    rows = rows_with(SLM_alone=small, LLM_alone=large, **{"labels-kappa0.1-seed0": ours})
    wall = {"kind": "wall-clock", "name": "wall-clock",
            "ms": {"SLM alone": [110.0] * 8, "LLM alone": [350.0] * 8, "labels-kappa0.1-seed0": [160.0] * 8}}
    line = next(x for x in frontier.recipes([*rows, wall]).splitlines() if x.startswith("| from labels"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[:5] == ["from labels, kappa 0.1", "75.0", "10.0", "9.0", "150.0"]
    assert cells[5].startswith("+0.0 ") and cells[6].startswith("+25.0 [") and cells[7].startswith("+25.0 [")
    assert cells[8].startswith("+30.4 [")
    assert frontier.gap_by_clock(rows, "labels-kappa0.1-seed0") == ""  # nothing was timed


def test_the_gap_against_r2r_has_the_time_of_its_net():
    """R2R: 75 % in 150 ms, and 10 decisions of 5 ms; ours 75 % in 150 ms: 1 - 150 / 200 = 25 %."""
    ours = [[1, 9, 1, 150.0], [1, 9, 1, 150.0], [1, 9, 1, 150.0], [0, 9, 1, 150.0]] * 2
    rows = rows_with(**{"labels-kappa0.35-seed0": ours})
    compared = [{"kind": "test", "family": "R2R", "asked": 10.0, "outcomes": ours},
                {"kind": "router times", "ms": {"R2R": 5.0}}]
    assert "| from labels, kappa 0.35 | +25.0 [" in frontier.against_r2r(rows, compared)
    assert frontier.against_r2r(rows, []) == "" == frontier.against_r2r([], compared)
