"""Work in processes, or in this one."""
import os
import threading

import pytest

from analysis.instruments.pool import completed, parallel_map


def process_and(x: int) -> tuple[int, int]:
    return os.getpid(), x * x


@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_is_done_once_and_keyed(workers):
    got = dict(completed(workers, {f"job {x}": (process_and, x) for x in range(5)}))
    assert {key: square for key, (_, square) in got.items()} == {f"job {x}": x * x for x in range(5)}
    assert (os.getpid() in {process for process, _ in got.values()}) == (workers == 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_parallel_map_keeps_the_order(workers):
    with parallel_map(workers) as run:
        assert [square for _, square in run(process_and, range(6))] == [0, 1, 4, 9, 16, 25]


def test_one_worker_stays_in_the_main_thread():
    """math-verify's time limits work by signals, which only that one gets."""
    (_, thread), = completed(1, {"job": (threading.current_thread,)})
    assert thread is threading.main_thread()
    assert list(completed(2, {})) == []
