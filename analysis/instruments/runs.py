"""Runs that go on after a kill: nothing that is there is computed again."""
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path

from tqdm import tqdm

from analysis.instruments.pool import completed
from analysis.instruments.rows import append_row, read_rows, write_rows


def fill(path: Path, jobs: dict[Hashable, tuple], current: Callable[[], dict], made_with: Callable[[Hashable], str], workers: int, label: str) -> dict:
    """Append to `path` the rows of those jobs whose keys current() lacks, each with what it was made with; current() afterwards."""
    have = current()
    missing = {key: job for key, job in jobs.items() if key not in have}
    for key, row in tqdm(completed(workers, missing, "__main__"), total=len(missing), desc=label, disable=None):
        append_row(path, row | {"made_with": made_with(key)})
    return current()


def run_stage(path: Path, stage, settings, rows: list[dict], run) -> list[dict]:
    """The rows with what the stage adds. A block that a kill cut short is worked on again, whole: rounding depends on who shares a batch."""
    done = read_rows(path)
    if len(done) < len(rows):
        done = done[:len(done) // settings.block * settings.block]
        if path.exists():
            write_rows(path, done)
        blocks = [rows[at:at + settings.block] for at in range(len(done), len(rows), settings.block)]
        with tqdm(total=len(rows), initial=len(done), desc=path.stem, unit="problem", disable=None) as bar:
            for block in run(partial(stage, settings), blocks):
                append_row(path, *block)
                done += block
                bar.update(len(block))
    return [row | more for row, more in zip(rows, done)]
