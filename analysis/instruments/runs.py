"""Runs that go on after a kill: what a folder is made with, and rows that are computed once."""
import json
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from analysis.instruments.pool import completed
from analysis.instruments.progress import progress
from analysis.instruments.rows import append_row, read_rows, write_rows


def settle(folder: Path, made: dict, what: str, name: str = "config.json",
           first: Callable[[], dict] = dict) -> dict:
    """What the files of a folder are made with, written down at the first call, with what `first` adds then.

    ValueError where that is not `made`: `what` says in a word or two what the folder holds."""
    path, made = folder / name, json.loads(json.dumps(made))
    if not path.exists():
        more = first()
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(path, [made | more])
    known = json.loads(path.read_text())
    for key, value in made.items():
        old = known.get(key)
        if old != value:
            if isinstance(old, dict) and isinstance(value, dict):
                changed = [k for k in old | value if old.get(k) != value.get(k)]
                old, value = ({k: x[k] for k in changed if k in x} for x in (old, value))
            raise ValueError(f"{folder} holds {what} of other {key}: expected {old}, got {value}; "
                             "take another folder")
    return known


@dataclass(frozen=True)
class Rows:
    """A file of rows, each computed once: a run goes on with those that are missing."""

    path: Path
    key: Callable[[dict], Hashable]  # what a row is of
    # fields of the row of a key; one with others is passed over, not removed
    made: Callable[[Hashable], dict]

    def have(self) -> dict[Hashable, dict]:
        """The rows that count, the last of each key."""
        found = {}
        for row in read_rows(self.path):
            key = self.key(row)
            if all(row.get(name) == value for name, value in self.made(key).items()):
                found[key] = row
        return found

    def missing(self, keys: Iterable[Hashable]) -> list:
        have = self.have()
        return [key for key in keys if key not in have]

    def add(self, key: Hashable, row: dict) -> None:
        append_row(self.path, row | self.made(key))

    def fill(self, jobs: dict[Hashable, tuple], workers: int, label: str) -> dict[Hashable, dict]:
        """Run the jobs (function, *arguments) whose rows are missing, and add what each returns; the rows
        that count."""
        todo = {key: jobs[key] for key in self.missing(jobs)}
        if todo:
            with progress(len(todo), label) as bar:
                for key, row in completed(workers, todo, "__main__"):
                    self.add(key, row)
                    bar.update()
        return self.have()


def run_stage(path: Path, stage: Callable, settings, rows: list[dict], run: Callable) -> list[dict]:
    """The rows with what the stage adds, in order and a block at a time, so that a run that was killed ends
    with the same bytes: a block that it cut short is worked on again, whole, since rounding depends on who
    shares a batch."""
    done = read_rows(path)
    if len(done) < len(rows):
        done = done[:len(done) // settings.block * settings.block]
        if path.exists():
            write_rows(path, done)
        blocks = [rows[at:at + settings.block] for at in range(len(done), len(rows), settings.block)]
        with progress(len(rows), path.stem, "problem", initial=len(done)) as bar:
            for block in run(partial(stage, settings), blocks):
                append_row(path, *block)
                done += block
                bar.update(len(block))
    return [row | more for row, more in zip(rows, done)]
