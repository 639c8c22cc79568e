"""How far a long piece of work is, on a terminal and in a log file."""
import sys

import pytest

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


def test_a_bar_that_is_only_asked_tells_the_time(clock, capsys):
    with progress(10, "slow") as bar:
        clock[0] += 31
        bar.update(0)
    assert "slow: 0 of 10, 00:31 gone" in capsys.readouterr().err


def test_a_terminal_gets_a_bar(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress(2, "answers") as bar:
        bar.update(2)
    assert "\r" in capsys.readouterr().err


def test_tracked_hands_out_every_item():
    assert list(tracked("abc", "letters")) == ["a", "b", "c"]
