"""How far a long piece of work is, on a terminal and in a log file."""
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from analysis.instruments import progress as instrument
from analysis.instruments.progress import progress, tracked


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only the test moves on."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_a_log_file_gets_a_line_every_half_minute(clock, capsys):
    with progress(100, "answers") as bar:
        for _ in range(60):  # a second each
            clock[0] += 1
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("answers: 0 of 100") and lines[-1].startswith("answers: 60 of 100")
    assert 3 <= len(lines) <= 4 and "answers: 30 of 100, 00:30 gone, 01:10 left" in lines  # 70 s at that pace
    assert not any("\r" in line for line in lines)


def test_a_log_file_hears_of_work_that_counts_nothing(capsys, monkeypatch):
    monkeypatch.setattr(instrument, "LINE", 0.5)
    with progress(10, "slow") as bar:
        bar.update(4)
        time.sleep(2.5)  # told once a second
        assert "slow: 4 of 10, 00:01 gone, 00:0" in capsys.readouterr().err  # with an estimate
    time.sleep(1.5)
    assert capsys.readouterr().err.count("slow") == 1  # the last state; nothing once it is closed


def test_the_estimate_is_not_spoilt_by_lines_that_only_tell_the_time(clock, capsys):
    with progress(10, "slow") as bar:
        clock[0] += 100
        bar.update(0)
        bar.update(5)
        clock[0] += 100
        bar.update(0)
    # 5 in 200 s
    assert "slow: 5 of 10, 03:20 gone, 03:20 left" in capsys.readouterr().err


def test_a_step_moves_no_cursor_in_a_log_file(clock, capsys):
    with progress(2, "work") as outer, progress(2, "step", inner=True) as inner:
        for bar in (inner, outer):
            clock[0] += 31
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["work: 0 of 2", "step: 1 of 2", "work: 1 of 2",
                                                          "work: 1 of 2"]


@pytest.mark.parametrize("seconds, lines", [(29, 0), (31, 1)])
def test_a_step_of_longer_work_shows_if_it_takes_long(clock, capsys, seconds, lines):
    with progress(10, "step", inner=True) as bar:
        clock[0] += seconds
        bar.update()
    assert capsys.readouterr().err.count("step: 1 of 10") == lines


def test_worker_processes_tell_nothing(capfd):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(list_of_letters).result() == ["a", "b", "c"]
    assert "letters" not in capfd.readouterr().err


def list_of_letters() -> list[str]:
    return list(tracked("abc", "letters"))


def test_a_terminal_gets_a_bar(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress(2, "answers") as bar:
        bar.update(2)
    assert "\r" in capsys.readouterr().err


def test_tracked_hands_out_every_item():
    assert list_of_letters() == ["a", "b", "c"]
