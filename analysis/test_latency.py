"""The fitted latency model."""
import json

import numpy as np
import pytest

import rstitch
from analysis import latency
from analysis.instruments.task import load_latency
from analysis.pocket.domain import problems


def test_latency_is_fitted_checked_and_read_back(tmp_path, pocket, capsys):
    measured = latency.measure(pocket, problems("dev", 3, 0), max_len=330, rounds=2)
    assert {t["method"] for t in measured["trajectories"]} == set(latency.METHODS)
    assert len(measured["trajectories"]) == len(latency.METHODS)  # of three problems the second
    row = latency.evaluate(measured) | {"seed": 0, "device": "cpu", "dtype": "float32", "torch": "x"}
    (tmp_path / "latency.json").write_text(json.dumps(row))
    slm, llm = load_latency(tmp_path / "latency.json")
    assert slm.coefficients == {k: tuple(v) for k, v in row["slm"].items()}
    assert llm.decode(50) > slm.decode(50) > 0
    latency.plot(row, tmp_path / "latency.png")
    assert (tmp_path / "latency.png").stat().st_size > 10_000
    assert all(name in latency.show(row) for name in latency.METHODS)


def test_overhead_names_its_parts(pocket):
    row = latency.overhead(pocket, repeats=2, tokens=5)
    assert 0 < row["entropy"]["ms"] < row["step, entropy rule"]["ms"]
    assert row["forward"]["ms"] < row["step, policy asked"]["ms"]
    assert row["loop, per token"]["share"] == 1 and row["loop_ms"] > 0


def test_held_out_points_are_not_those_of_the_profile_and_all_fit():
    profile, held = latency.grid_points(384), latency.held_out_points(384)
    assert all(n + kv <= 384 for n, kv in profile + held) and len(set(held) & set(profile)) <= 1
    assert {n == 1 for n, _ in held} == {True, False}


def test_steps_of_a_trajectory_by_hand():
    """Results at 1, 3 and 6 ms, then at 1, 2 and 9 ms: the second step took 2 and 1 ms, the third 3 and 7."""
    calls = [rstitch.Call(rstitch.SLM, 0, 10, 0, 5, 0.1, True),
             rstitch.Call(rstitch.SLM, 1, 1, 10, 6, 0.9, False),
             rstitch.Call(rstitch.LLM, 1, 11, 0, 7, 0.1, True)]
    steps = latency.step_samples(calls, [[0.001, 0.003, 0.006], [0.001, 0.002, 0.009]])
    assert [s[:2] for s in steps["slm"] + steps["llm"]] == [(1, 10), (11, 0)]
    assert [s.ms for s in steps["slm"] + steps["llm"]] == pytest.approx([1.5, 5.0])


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
