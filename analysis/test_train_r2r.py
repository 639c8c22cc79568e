"""Training of R2R's router."""
import dataclasses
import json
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import rstitch
from analysis import label, train_r2r
from analysis.instruments.judges import SameStatement
from analysis.instruments.rows import read_rows
from analysis.instruments.task import solve
from analysis.pocket.domain import problems
from conftest import tiny, words
from test_rstitch import DEVICES

SMALL = train_r2r.Config(top_k=10, width=16, blocks=1, lr=1e-2, epochs=4, batch=64)


def planted(n: int, seed: int, top_k: int = 10, hidden: int = 32) -> train_r2r.Tokens:
    """Tokens that are divergent where the first hidden unit is large."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(n, hidden, generator=generator)
    label_ = (h[:, 0] > 1).double().numpy()
    label_[:5] = np.nan
    return train_r2r.Tokens(h, torch.randn(n, top_k, generator=generator).sort(descending=True).values,
                            torch.randint(0, 40, (n,), generator=generator), label_, np.arange(n) // 10,
                            np.arange(n) % 10 / 10)


@pytest.mark.parametrize("device", DEVICES)
def test_the_router_learns_a_planted_rule(tmp_path, device):
    slm = tiny.__wrapped__("Qwen2", 1).to(device)
    net = train_r2r.train(dataclasses.replace(SMALL, epochs=15), slm, planted(2000, 0), planted(300, 1),
                          tmp_path)
    test = planted(500, 2)
    score = train_r2r.scores(net, test)
    score, y = score[5:], test.label[5:]
    assert train_r2r.auroc(score, y) > 0.98
    assert np.median(score[y == 1]) > 0.8 > 0.2 > np.median(score[y == 0])


@pytest.fixture
def saved(tmp_path):
    """Two tiny random models and a judge, saved with a tokenizer, and a file of questions."""
    for name, family, seed in (("slm", "Qwen2", 1), ("llm", "Llama", 2), ("judge", "Qwen3", 3)):
        tiny(family, seed, vocab_size=36).save_pretrained(tmp_path / name)
        words(32).save_pretrained(tmp_path / name)
    questions = [" ".join(f"w{(7 * i + j * i) % 29}" for j in range(6)) for i in range(1, 60)]
    lines = [json.dumps({"question": question, "answer": "1"}) for question in questions]
    (tmp_path / "problems.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_a_killed_router_run_ends_like_an_uninterrupted_one(tmp_path, monkeypatch):
    slm, data, dev = tiny("Qwen2", 1), planted(300, 0), planted(100, 1)
    whole = train_r2r.train(SMALL, slm, data, dev, tmp_path / "whole")
    saved, calls = train_r2r.save_checkpoint, []

    def killed(path, *args):  # after the second epoch was logged, before its checkpoint
        calls.append(path.name)
        if path.name == "last.safetensors" and calls.count(path.name) == 2:
            raise KeyboardInterrupt
        saved(path, *args)

    monkeypatch.setattr(train_r2r, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        train_r2r.train(SMALL, slm, data, dev, tmp_path / "parts")
    monkeypatch.setattr(train_r2r, "save_checkpoint", saved)
    assert len(read_rows(tmp_path / "parts" / "log.jsonl")) == 2
    parts = train_r2r.train(SMALL, slm, data, dev, tmp_path / "parts")
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), parts.parameters()))
    whole_bytes = (tmp_path / "whole" / "last.safetensors").read_bytes()
    assert whole_bytes == (tmp_path / "parts" / "last.safetensors").read_bytes()
    with pytest.raises(ValueError,
                       match="holds a run of other config: expected .*'width': 16.*, got .*'width': 8"):
        train_r2r.train(dataclasses.replace(SMALL, width=8), slm, data, dev, tmp_path / "whole")


def test_training_stops_early_and_keeps_the_best_epoch(tmp_path, monkeypatch):
    losses = iter([0.5, 0.3, 0.4, 0.45, 0.2])
    monkeypatch.setattr(train_r2r, "weighted_bce", lambda *_: next(losses))
    config = dataclasses.replace(SMALL, epochs=9, patience=2)
    net = train_r2r.train(config, tiny("Qwen2", 1), planted(100, 0), planted(50, 1), tmp_path)
    # two epochs without a lower one
    assert [row["dev_loss"] for row in read_rows(tmp_path / "log.jsonl")] == [0.5, 0.3, 0.4, 0.45]
    best, last = train_r2r.build_net(config, tiny("Qwen2", 1)), train_r2r.build_net(config, tiny("Qwen2", 1))
    assert train_r2r.load_checkpoint(tmp_path / "best.safetensors", best) == 2
    assert train_r2r.load_checkpoint(tmp_path / "last.safetensors", last) == 4
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), best.parameters()))
    assert not all(torch.equal(p, q) for p, q in zip(net.parameters(), last.parameters()))


def test_a_run_on_other_labels_is_not_taken_for_this_one(tmp_path):
    data, dev = planted(200, 0), planted(50, 1)
    train_r2r.train(SMALL, tiny("Qwen2", 1), data, dev, tmp_path)
    data.label[7] = 1 - data.label[7]
    with pytest.raises(ValueError, match="holds a run of other labels"):
        train_r2r.train(SMALL, tiny("Qwen2", 1), data, dev, tmp_path)


def test_labels_of_one_kind_are_refused(tmp_path):
    data = planted(50, 0)
    data.label[:] = 0
    with pytest.raises(ValueError, match="0 divergent tokens of 50: expected some of both kinds"):
        train_r2r.train(SMALL, tiny("Qwen2", 1), data, planted(50, 1), tmp_path)


def test_loss_weight_by_hand():
    # -3 log 0.8 for the divergent token, -log 0.9 for the other: (0.6694 + 0.1054) / 2
    assert train_r2r.weighted_bce(np.array([0.8, 0.1]), np.array([1.0, 0.0]),
                                  3.0) == pytest.approx(0.3874, abs=1e-4)


def test_average_precision_by_hand():
    # by score: 1, 0, 1, and two tied of which one is divergent: 1/3 x 1 + 1/3 x 2/3 + 1/3 x 3/5
    assert train_r2r.average_precision(np.array([0.9, 0.8, 0.7, 0.2, 0.2]),
                                       np.array([1, 0, 1, 1, 0])) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)


def test_figures_of_the_router_by_hand():
    t = planted(10, 0)
    t.label = np.array([1, 1, 0, 0, 0, 0, 0, 0, np.nan, 0])
    score = np.array([0.95, 0.15, 0.85, 0.05, 0.05, 0.05, 0.05, 0.05, 0.9, 0.05])
    r = train_r2r.evaluate(score, t, calibration=score, threshold=0.5)
    assert r["usage"][0] == 0.3 and r["recall"][0] == 0.5  # 0.95, 0.85, 0.9 of ten; one of two
    assert r["divergent"] == pytest.approx(2 / 9) and r["usage_by_decile"] == [1, 0, 1, 0, 0, 0, 0, 0, 1, 0]
    assert [n for *_, n in r["reliability"]] == [6, 1, 1, 1] and r["reliability"][-1][:2] == [0.95, 1.0]
    assert [got for u, _, got in r["targets"] if u in (0.1, 0.2, 0.3)] == pytest.approx([0.1, 0.2, 0.3])


def test_features_are_what_the_slm_computes_and_go_on_after_a_kill(tmp_path, pocket, labelled, monkeypatch):
    slm, rows = pocket[0], labelled[1][:3]
    data = train_r2r.features(slm, 128, rows, 12, tmp_path / "a")
    assert data.token.tolist() == [c for row in rows for c in row["slm"]]
    assert data.problem.tolist() == [i for i, row in enumerate(rows) for _ in row["answer"]]
    t = len(rows[0]["answer"]) + 7
    with torch.no_grad():
        out = slm(torch.tensor([rows[1]["prompt"] + rows[1]["answer"][:7]]), output_hidden_states=True)
    torch.testing.assert_close(data.hidden[t], out.hidden_states[-1][0, -1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(data.top[t], out.logits[0, -1].topk(12).values, atol=1e-4, rtol=1e-4)
    letters = "".join(row["labels"] for row in rows)
    assert np.array_equal(data.label, [{"D": 1.0, "U": np.nan}.get(c, 0.0) for c in letters], equal_nan=True)
    monkeypatch.setattr(label, "teacher_forced", None)  # nothing is read twice
    again = train_r2r.features(slm, 128, rows, 12, tmp_path / "a")
    assert torch.equal(again.hidden, data.hidden) and torch.equal(again.top, data.top)


def test_an_exported_router_routes_as_it_did_and_refuses_another_pair(tmp_path, pocket):
    config = dataclasses.replace(train_r2r.POCKET, width=8, blocks=0, epochs=1)
    net = train_r2r.build_net(config, pocket[0]).eval()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text(json.dumps({"epoch": 0, "loss": 1.0, "dev_loss": 1.0,
                                                            "seconds": 1.0}) + "\n")
    made = train_r2r.export(config, net, pocket, tmp_path / "run", tmp_path / "out", {}, 0.5,
                            {"calibration": 4}, {"seed": 0})
    assert "embed" not in " ".join(load_file(tmp_path / "out" / "router.safetensors"))
    assert made["hidden_size"] == 96
    assert made["top_k"] == 100
    todo = problems("dev", 4, seed=5)
    before = solve(pocket, todo, rstitch.R2RRouter(net.requires_grad_(False), 0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        router = rstitch.R2RRouter.load(tmp_path / "out", *pocket[:2])
    assert router.threshold == 0.5
    assert [s["text"] for s in solve(pocket, todo, router)] == [s["text"] for s in before]
    with pytest.warns(UserWarning, match="threshold 0.7 in place of the router's own 0.5"):
        assert rstitch.R2RRouter.load(tmp_path / "out", *pocket[:2], threshold=0.7).threshold == 0.7
    with pytest.raises(ValueError, match="was made for another SLM"):
        rstitch.R2RRouter.load(tmp_path / "out", pocket[1], pocket[1])
    with pytest.raises(ValueError, match="was made for another LLM"):
        rstitch.R2RRouter.load(tmp_path / "out", pocket[0], pocket[0])


@pytest.mark.parametrize("change, message", [
    (dict(width=0), "--width=0"), (dict(dropout=1.0), "--dropout 1.0: expected a number in"),
    (dict(lr=-1.0), "--lr -1.0"), (dict(recall=0.0), "--recall 0.0"),
    (dict(blocks=-1), "--blocks=-1"), (dict(weight_decay=float("nan")), "--weight-decay nan"),
])
def test_router_runs_with_bad_options_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        train_r2r.Config(**change)


@pytest.mark.parametrize("judge", ["judge", "answer"])
def test_any_pair_is_labelled_and_trained_on_from_the_command_line(saved, judge, monkeypatch, capsys):
    argv = ["train_r2r", "--slm", saved / "slm", "--llm", saved / "llm", "--problems",
            saved / "problems.jsonl", "--judge", saved / judge if judge == "judge" else judge,
            "--max-new-tokens", 12, "--sentence-tokens", 6, "--block", 8, "--labels", saved / "labels",
            "--run", saved / "run", "--out", saved / "out",
            "--width", 8, "--blocks", 1, "--top-k", 5, "--epochs", 2]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    monkeypatch.setattr(SameStatement, "__call__", None)  # nothing of the pocket domain is used
    # random models say nothing that counts and hardly ever end an answer: labels are planted after all stages
    # have run
    make = label.make_labels
    monkeypatch.setattr(label, "make_labels", lambda *a: [{**row, "labels": ("DN" * 99)[:len(row["labels"])]}
                                                          for row in make(*a)])
    train_r2r.main()
    assert "test split, offline" in capsys.readouterr().out
    made = json.loads((saved / "out" / "made.json").read_text())
    assert made["hidden_size"] == 32 and (saved / "out" / "router.png").stat().st_size > 10_000
    rows = read_rows(saved / "labels" / "labels.jsonl")
    assert len(rows) == len(read_rows(saved / "problems.jsonl"))
    assert set("".join(r["labels"] for r in rows)) <= set("INDU")
    pair = rstitch.load_pair(str(saved / "slm"), str(saved / "llm"))
    assert rstitch.R2RRouter.load(saved / "out", *pair[:2]).threshold == made["threshold"]
