"""Command lines."""

import pytest

from analysis import (
    answers,
    bench,
    clock,
    collect,
    compare,
    frontier,
    label,
    latency,
    rounding,
    train_policy,
    train_r2r,
)
from analysis.pocket import pair
from analysis.presentation import figures


@pytest.mark.parametrize("module, option", [
    (answers, "latency"), (answers, "control"), (clock, "rows"), (rounding, "router"), (frontier, "router"),
    (train_policy, "out")])
def test_options_that_a_command_does_not_look_at_are_refused(module, option, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["module", f"--{option}", "1"])
    with pytest.raises(SystemExit):
        module.main()
    assert f"unrecognized arguments: --{option}" in capsys.readouterr().err


@pytest.mark.parametrize("module", [collect, compare, figures, label, latency, pair, train_policy, train_r2r,
                                    bench, frontier])
def test_options_cannot_be_abbreviated(module, monkeypatch, capsys):
    argv = ["--train", "slm", "--thread", "1"] if module is pair else ["--devic", "cpu"]
    monkeypatch.setattr("sys.argv", ["module", *argv])
    with pytest.raises(SystemExit):
        module.main()
    assert f"unrecognized arguments: {argv[-2]}" in capsys.readouterr().err
