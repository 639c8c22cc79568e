"""Work that is shared by the processes of torchrun: the same rows as by one process."""
import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

from analysis import answers, collect
from analysis.instruments.rows import append_row, read_rows
from analysis.instruments.runs import Rows, part_of, parts_of, run_stage
from conftest import torchrun
from rstitch_hf import ranks

ANSWERS = ["-m", "analysis.answers", "--split", "dev", "--n", "9", "--methods", "tau=0.02", "slm", "--rows",
           "1", "--max-new-tokens", "60", "--out"]
COLLECT = ["-m", "analysis.collect", "--n", "12", "--block", "4", "--max-new-tokens", "40", "--out"]


def finished(process: subprocess.Popen) -> str:
    out, errors = process.communicate(timeout=120)
    assert not process.returncode, errors
    return out


def bare(path: Path) -> str:
    """A file's rows, but for what says where they come from."""
    return "".join(json.dumps({k: v for k, v in row.items() if k not in ("command", "commit")}) + "\n"
                   for row in read_rows(path))


def process_of_rank(launcher: int, rank: int) -> int:
    """Its process id, among the children of torchrun."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return next(int(pid) for pid in children
                if f"\0RANK={rank}\0" in "\0" + Path(f"/proc/{pid}/environ").read_text())


def printed(module, *arguments) -> str:
    """What a command prints in this process, which is no rank."""
    with patch.object(sys, "argv", list(map(str, arguments))), redirect_stdout(io.StringIO()) as out:
        module.main()
    return out.getvalue()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The files of one process."""
    folder = tmp_path_factory.mktemp("alone")
    answered = printed(answers, *ANSWERS[1:], folder / "a.jsonl")
    return folder, answered, printed(collect, *COLLECT[1:], folder)


def test_two_ranks_leave_the_rows_of_one_process_and_print_them_once(alone, tmp_path):
    folder, answered, collected = alone
    assert finished(torchrun(2, *ANSWERS, tmp_path / "a.jsonl")) == answered
    assert finished(torchrun(2, *COLLECT, tmp_path)) == collected
    for name in ("a.jsonl", "trajectories.jsonl", "interventions.jsonl"):
        assert bare(tmp_path / name) == bare(folder / name) and not parts_of(tmp_path / name)
        assert len(read_rows(tmp_path / name)) == (18 if name == "a.jsonl" else 12)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the process in /proc")
def test_what_a_killed_rank_leaves_the_next_run_completes(alone, tmp_path):
    path = tmp_path / "a.jsonl"
    process = torchrun(2, *ANSWERS, path)
    begun = time.monotonic()
    while len(read_rows(part_of(path, 1))) < 2:
        assert process.poll() is None and time.monotonic() - begun < 90
        time.sleep(0.02)
    os.kill(process_of_rank(process.pid, 1), signal.SIGKILL)
    process.communicate(timeout=60)  # torchrun ends the others
    assert process.returncode and not path.exists() and parts_of(path)
    left = {row["problem"] for part in parts_of(path) for row in read_rows(part)}
    with open(part_of(path, 1), "a") as file:
        file.write('{"torn')
    finished(torchrun(2, *ANSWERS, path))
    assert bare(path) == bare(alone[0] / "a.jsonl") and not parts_of(path) and left


def test_ranks_share_keys_whatever_the_others_have_done(tmp_path, monkeypatch):
    store = Rows(tmp_path / "r.jsonl", lambda row: row["x"], lambda key: {})
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("analysis.instruments.runs.meet", lambda: None)
    for rank, expected in ((0, [0, 3, 6]), (1, [1, 4]), (2, [2, 5])):
        monkeypatch.setenv("RANK", str(rank))
        assert store.missing(range(7)) == expected
        for x in expected:
            store.add(x, {"x": x})
    assert not (tmp_path / "r.jsonl").exists() and store.have().keys() == set(range(7))
    monkeypatch.setenv("RANK", "0")
    store.settle(range(7), False)
    assert [row["x"] for row in read_rows(tmp_path / "r.jsonl")] == [*range(7)]
    assert not parts_of(tmp_path / "r.jsonl")


def test_rows_are_put_into_order_where_they_stand(tmp_path):
    store = Rows(tmp_path / "r.jsonl", lambda row: row["x"], lambda key: {"made": 1})
    append_row(store.path, {"x": "other", "made": 1}, {"x": 2, "made": 1}, {"x": 1, "made": 0},
               {"x": 1, "made": 1}, {"x": 2, "made": 1, "new": 1})
    before = store.path.read_bytes()
    store.settle([1, 2], changed=False)
    assert store.path.read_bytes() == before
    store.settle([1, 2], changed=True)
    assert read_rows(store.path) == [{"x": "other", "made": 1}, {"x": 1, "made": 1}, {"x": 1, "made": 0},
                                     {"x": 2, "made": 1, "new": 1}]


class Settings:
    block = 2


def tenfold(settings, rows):
    return [{"y": 10 * row["x"]} for row in rows]


def test_stages_by_ranks_equal_those_of_one(tmp_path, monkeypatch):
    rows = [{"x": x} for x in range(7)]
    whole = run_stage(tmp_path / "one.jsonl", tenfold, Settings, rows, map)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("analysis.instruments.runs.meet", lambda: None)
    path = tmp_path / "two.jsonl"
    append_row(path, {"y": 0}, {"y": 10}, {"y": "of a block that was cut short"})
    monkeypatch.setenv("RANK", "1")
    run_stage(path, tenfold, Settings, rows, map)
    assert [row["at"] for row in read_rows(part_of(path, 1))] == [2, 3, 6]
    monkeypatch.setenv("RANK", "0")
    assert run_stage(path, tenfold, Settings, rows, map) == whole
    assert path.read_bytes() == (tmp_path / "one.jsonl").read_bytes() and not parts_of(path)


def test_what_one_process_does_is_refused_by_several(monkeypatch):
    ran = []
    ranks.start(lambda: ran.append("alone"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    ranks.start(lambda: ran.append("shared"), shared=True)
    with pytest.raises(SystemExit, match=" is for one process, 2 were started"):
        ranks.start(lambda: ran.append("not"))
    assert ran == ["alone", "shared"]


def test_the_others_are_silent_but_for_a_crash(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    for name in ("stdout", "stderr", "excepthook"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    ranks.begin()
    print("nothing")
    assert sys.excepthook is not sys.__excepthook__
    monkeypatch.undo()
    assert capsys.readouterr().out == ""
