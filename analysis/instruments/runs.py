"""Runs that go on after a kill: what a folder is made with, and rows that are computed once.

Under torchrun the ranks share what is to be computed. Each appends to a file of its own beside the real one,
and when all have ended the first puts the rows together, in the order that one process leaves them in.
"""
import glob
import json
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from analysis.instruments.pool import completed
from analysis.instruments.progress import progress
from analysis.instruments.rows import append_row, read_rows, write_rows
from rstitch_hf.ranks import meet, rank, world


def settle(folder: Path, made: dict, what: str, name: str = "config.json",
           first: Callable[[], dict] = dict) -> dict:
    """What the files of a folder are made with, written down at the first call, with what `first` adds then.

    ValueError where that is not `made`: `what` says in a word or two what the folder holds."""
    path, made = folder / name, json.loads(json.dumps(made))
    if rank() == 0 and not path.exists():
        more = first()
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(path, [made | more])
    meet()
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


def part_of(path: Path, number: int) -> Path:
    """Where a rank keeps its rows."""
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.rank{number}.jsonl")


def parts_of(path: Path) -> list[Path]:
    """What ranks have left, of this run or of one that was killed."""
    return sorted(path.parent.glob(f"{glob.escape(path.name.removesuffix('.jsonl'))}.rank*.jsonl"))


def by_place(path: Path) -> dict[int, dict]:
    """The rows of a stage by their place in its file, which the parts of ranks note."""
    parts = {row.pop("at"): row for part in parts_of(path) for row in read_rows(part)}
    return dict(enumerate(read_rows(path))) | parts


def joined(stages: Sequence[dict[int, dict]]) -> list[dict]:
    """What all stages say of each place that they all have, in the order of places."""
    return [{key: value for stage in stages for key, value in stage[at].items()}
            for at in sorted(set.intersection(*map(set, stages)))]


def put_together(path: Path, rows: Callable[[], list[dict]], changed: bool = False) -> None:
    """When all ranks are here, the first writes the file, if it or a part of it has changed, and removes the
    parts."""
    meet()
    if rank() == 0 and (parts_of(path) or changed):
        write_rows(path, rows())
        for part in parts_of(path):
            part.unlink()
    meet()


@dataclass(frozen=True)
class Rows:
    """A file of rows, each computed once: a run goes on with those that are missing."""

    path: Path
    key: Callable[[dict], Hashable]  # what a row is of
    # fields of the row of a key; one with others is passed over, not removed. None: it has no such field
    made: Callable[[Hashable], dict]

    def have(self) -> dict[Hashable, dict]:
        """The rows that count, the last of each key."""
        found = {}
        for row in self.all_rows():
            key = self.key(row)
            if self.counts(row):
                found[key] = row
        return found

    def all_rows(self) -> list[dict]:
        return [row for path in (self.path, *parts_of(self.path)) for row in read_rows(path)]

    def counts(self, row: dict) -> bool:
        return all(row.get(name) == value for name, value in self.made(self.key(row)).items())

    def missing(self, keys: Iterable[Hashable]) -> list:
        """This rank's share of the keys, those that have a row left out."""
        have = self.have()
        return [key for i, key in enumerate(keys) if i % world() == rank() and key not in have]

    def add(self, key: Hashable, row: dict) -> None:
        made = {name: value for name, value in self.made(key).items() if value is not None}
        append_row(self.path if world() == 1 else part_of(self.path, rank()), row | made)

    def settle(self, keys: Iterable[Hashable], changed: bool) -> dict[Hashable, dict]:
        """The rows that count, once every rank has added its own: those of the keys stand in order then,
        whoever made which. changed: whether this process has added any."""
        order = {key: i for i, key in enumerate(keys)}

        def ordered() -> list[dict]:
            rows = self.all_rows()
            mine = [self.counts(row) and self.key(row) in order for row in rows]
            last = {self.key(row): row for row, one in zip(rows, mine) if one}
            queue = deque(sorted(last.values(), key=lambda row: order[self.key(row)]))
            return [queue.popleft() if one else row for row, one in zip(rows, mine) if queue or not one]

        put_together(self.path, ordered, changed)
        return self.have()

    def fill(self, jobs: dict[Hashable, tuple], workers: int, label: str) -> dict[Hashable, dict]:
        """Run the jobs (function, *arguments) whose rows are missing, and add what each returns; the rows
        that count."""
        todo = {key: jobs[key] for key in self.missing(jobs)}
        if todo:
            with progress(len(todo), label) as bar:
                for key, row in completed(workers, todo, "__main__"):
                    self.add(key, row)
                    bar.update()
        return self.settle(jobs, bool(todo))


def run_stage(path: Path, stage: Callable, settings, rows: list[dict], run: Callable) -> list[dict]:
    """The rows with what the stage adds, in order and a block at a time, so that a run that was killed ends
    with the same bytes: a block that it cut short is worked on again, whole, since rounding depends on who
    shares a batch. Ranks take blocks in turn."""
    starts = range(0, len(rows), settings.block)
    done = by_place(path)
    sizes = {start: len(rows[start:start + settings.block]) for start in starts}
    whole = {start for start in starts if all(start + i in done for i in range(sizes[start]))}
    todo = [start for i, start in enumerate(starts) if i % world() == rank() and start not in whole]
    kept = next((start for start in starts if start not in whole), len(rows))
    apart = world() > 1 or bool(parts_of(path))
    if todo and not apart and path.exists():
        write_rows(path, [done[i] for i in range(kept)])
    blocks = [rows[start:start + settings.block] for start in todo]
    with progress(len(rows), path.stem, "problem", initial=len(rows) - sum(sizes[start] for start in todo),
                  disable=not todo) as bar:
        for start, block in zip(todo, run(partial(stage, settings), blocks)):
            append_row(*([part_of(path, rank()), *({"at": start + i} | row for i, row in enumerate(block))]
                         if apart else [path, *block]))
            bar.update(len(block))
    put_together(path, lambda: [row for _, row in sorted(by_place(path).items())])
    return [row | more for row, more in zip(rows, read_rows(path))]
