"""The demonstration's table."""

import numpy as np
import pytest

import rstitch
from analysis import demo
from analysis.instruments.task import solve
from analysis.pocket.domain import problems


def test_the_table_compares_every_method_on_the_same_problems(pocket):
    with demo.make_pool(1) as pool:
        rows = {r["method"]: r for r in demo.table(pool, n=2, n_latency=1, seed=0)}
    assert list(rows)[:3] == ["SLM alone", "LLM alone", "LLM trained short"]
    assert [name.split(",")[0] for name in list(rows)[3:]] == ["R-Stitch",
                                                               "random"] * len(demo.TAUS) + ["R-Stitch+",
                                                                                             "R2R"]
    for name, router in (("SLM alone", rstitch.SLMOnly()),
                         ("R-Stitch, tau 0.02", rstitch.EntropyRouter(0.02))):
        solved = solve(pocket, problems("test", 2, 0), router)
        assert rows[name]["tokens"] == np.mean([s["tokens"] for s in solved])
        assert rows[name]["accuracy"] == np.mean([s["correct"] for s in solved])
        assert rows[name]["latency_tokens"] == solved[0]["tokens"]
    for r in rows.values():
        assert r["speed_up"] == pytest.approx(rows["LLM alone"]["latency_ms"] / r["latency_ms"])
        assert r["speed_up"] == pytest.approx(r["shorter"] * r["cheaper"])
        assert r["n"] == 2 and r["n_latency"] == 1 and r["latency_ms"] > 0 and r["command"]
    text = demo.show(list(rows.values()))
    assert all(name in text for name in rows) and "n = 2 test problems" in text and "\033" not in text
