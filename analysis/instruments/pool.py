"""Work in several processes, or in this one."""
import multiprocessing
import os
from collections.abc import Hashable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager

from analysis.instruments.provenance import COMMIT


def make_pool(workers: int, *preload: str) -> Executor:
    """Processes, or for one worker a thread of this one. A server that has imported `preload` once forks
    them, where there is one."""
    if workers == 1:
        return ThreadPoolExecutor(1)
    if COMMIT:
        os.environ["RSTITCH_COMMIT"] = COMMIT
    context = multiprocessing.get_context("forkserver"
                                          if "forkserver" in multiprocessing.get_all_start_methods()
                                          else "spawn")
    context.set_forkserver_preload(list(preload))
    return ProcessPoolExecutor(workers, mp_context=context)


@contextmanager
def parallel_map(workers: int, *preload: str):
    """`map` over processes, in order; with one worker the plain one, in this thread (math-verify's time
    limits need the main thread)."""
    if workers == 1:
        yield map
    else:
        with make_pool(workers, *preload) as pool:
            yield pool.map


def completed(workers: int, jobs: dict[Hashable, tuple], *preload: str) -> Iterator[tuple]:
    """(key, result) of every job (function, *arguments), as it ends; with one worker in turn, in this
    thread."""
    if workers == 1:
        yield from ((key, function(*arguments)) for key, (function, *arguments) in jobs.items())
    elif jobs:
        with make_pool(workers, *preload) as pool:
            running = {pool.submit(*job): key for key, job in jobs.items()}
            yield from ((running[job], job.result()) for job in as_completed(running))
