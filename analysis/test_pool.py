"""Work in processes, or in this one."""
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

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


def note_and_sleep(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)


def test_workers_end_with_a_run_that_is_killed(tmp_path):
    """Its pipes close when the last of its processes has ended."""
    code = ("from analysis.instruments.pool import completed; from analysis.test_pool import note_and_sleep; "
            "list(completed(2, {k: (note_and_sleep, f'{k}') for k in 'ab'}))")
    run = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE,
                           env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})
    while not all((tmp_path / name).exists() for name in "ab"):
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=20)


def test_one_worker_stays_in_the_main_thread():
    """math-verify's time limits work by signals, which only that one gets."""
    (_, thread), = completed(1, {"job": (threading.current_thread,)})
    assert thread is threading.main_thread()
    assert list(completed(2, {})) == []
