"""Command lines."""

import pytest

from analysis import bench, collect, compare, frontier, label, latency, train_policy, train_r2r
from analysis.pocket import pair
from analysis.presentation import figures


@pytest.mark.parametrize("module", [collect, compare, figures, label, latency, pair, train_policy, train_r2r,
                                    bench, frontier])
def test_options_cannot_be_abbreviated(module, monkeypatch, capsys):
    argv = ["--train", "slm", "--thread", "1"] if module is pair else ["--devic", "cpu"]
    monkeypatch.setattr("sys.argv", ["module", *argv])
    with pytest.raises(SystemExit):
        module.main()
    assert f"unrecognized arguments: {argv[-2]}" in capsys.readouterr().err
