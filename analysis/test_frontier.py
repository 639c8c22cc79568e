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
