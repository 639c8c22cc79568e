"""Where rows come from."""
import multiprocessing
import subprocess

import pytest

from analysis.instruments.pool import make_pool
from analysis.instruments.provenance import COMMIT, commit


def test_a_worker_asks_git_for_nothing(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("a worker ran git"))
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    monkeypatch.setenv("RSTITCH_COMMIT", "abc1234")
    assert commit() == "abc1234"


def test_workers_know_the_commit():
    if COMMIT is None:
        pytest.skip("not in git")
    with make_pool(2) as pool:
        assert pool.submit(commit).result() == COMMIT
