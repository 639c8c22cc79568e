"""Work in several processes, or in this one."""
import multiprocessing
import os
import threading
from collections.abc import Hashable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager

from analysis.instruments.provenance import COMMIT


def end_with_parent() -> None:
    """Ends this worker as soon as the process that wants its result is gone, killed for instance: else it
    would work on to the end of its job, beside the run that goes on."""
    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


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
    return ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent)


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
