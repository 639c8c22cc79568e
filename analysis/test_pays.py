"""What a pair can be expected to save."""
import json

import numpy as np
import pytest
import torch

import rstitch
from analysis import answers, pays
from analysis.instruments.problems import question
from analysis.instruments.task import Task, common_vocab, ends_of
from analysis.pocket.domain import problems

LN = np.log(128)


def test_reading_along_says_what_the_slm_would(pocket):
    slm, _, tokenizer = pocket
    prompt = rstitch.unpadded(*rstitch.encode(tokenizer, question(problems("dev", 1, 3)[0])))[0]
    own = rstitch.stitch(slm, slm, [prompt], rstitch.SLMOnly(), max_new_tokens=20, eos_token_id=[])
    tokens = [call.token for call in own.kept[0]]
    choice, H = pays.read_along(slm, prompt, tokens, common_vocab((slm, slm)))
    assert choice == tokens
    np.testing.assert_allclose(H, [call.entropy for call in own.kept[0]], atol=1e-4)


def test_the_replay_leaves_as_algorithm_1_does():
    """Entropies over ln 128: SLM .3 .0 .3 .0 .0, LLM .0 .3 .3 .0 .0, tau 0.1. The LLM writes the first token
    and leaves; the SLM writes the second; leaves at the third, which the LLM writes and keeps; it writes the
    fourth and hands back; the fifth is the SLM's. Of the last four tokens two are the LLM's."""
    seen = [(LN * np.array([0.3, 0, 0.3, 0, 0]), LN * np.array([0, 0.3, 0.3, 0, 0]))]
    leaves = pays.leaves_at(0.1, seen, 128, 5)
    assert leaves[:, 0].astype(int).tolist() == [[1, 0, 1, 0, 0], [1, 0, 0, 1, 1]]
    assert pays.share_of(leaves) == 2 / 4
    longer = pays.leaves_at(0.1, seen, 128, 7)[:, 0]
    assert longer[:, 5:].astype(int).tolist() == [[1, 0], [1, 0]]  # from the beginning again


def test_the_share_is_that_of_stitch_on_the_same_entropies(pocket):
    """On the stitched answer itself the replay is Algorithm 1: its writers, token by token."""
    slm, llm, tokenizer = pocket
    for problem in problems("dev", 6, 4):
        prompt = rstitch.unpadded(*rstitch.encode(tokenizer, question(problem)))[0]
        kept = rstitch.stitch(slm, llm, [prompt], rstitch.EntropyRouter(0.02), max_new_tokens=60,
                              eos_token_id=[]).kept[0]
        tokens = [call.token for call in kept]
        both = [np.array(pays.read_along(model, prompt, tokens, common_vocab(pocket))[1])
                for model in (slm, llm)]
        leaves = pays.leaves_at(0.02, [both], common_vocab(pocket), 60)
        start = next(t for t in range(60) if kept[t].model == rstitch.LLM and leaves[1, 0, t])  # as replayed
        writers = [call.model for call in kept[start + 1:]]
        assert pays.share_of(leaves[:, :, start:]) == pytest.approx(np.mean(writers))


def test_costs_lie_on_the_line_between_what_was_timed():
    curve = np.array([1.0, 2, 3, 4, 5, 6, 7, 8])  # ms at 1, 2, 4, 8, 16, 32, 64 and 128 tokens
    cost = pays.cost_of([curve, 10 * curve])
    assert cost(0, [1]) == 1 and cost(1, [2, 1]) == 30  # two rows of two tokens, one of them a pad
    assert cost(0, [3]) == 2.5 and cost(0, [64, 64, 64, 64]) == 16  # twice 128


def test_expected_speed_up_by_hand():
    """A step of the SLM takes 1 ms, the LLM's 4, whatever it reads. The SLM writes all but the first token:
    4 x. The LLM writes each after the SLM has proposed: 4 / 5 = 0.8 x."""
    flat = [np.ones(8), 4 * np.ones(8)]
    never, always = np.zeros((2, 3, 40), bool), np.ones((2, 3, 40), bool)
    never[1, :, 0] = True
    for batch in (1, 2, 8):
        assert pays.expected(never, flat, batch) == pytest.approx(4)
        assert pays.expected(always, flat, batch) == pytest.approx(0.8)


@pytest.mark.parametrize("right, alone, told", [
    ({"llm": [1] * 9 + [0], "slm": [1] * 8 + [0] * 2}, 3.0, "SLM alone may be as right"),
    ({"llm": [1] * 10, "slm": [0] * 10}, 1.05, "does not pay at tau 0.02: 1.05 x"),
    ({"llm": [1] * 10, "slm": [0] * 10, "tau=0.02": [0] * 8 + [1] * 2}, 2.0, "answers are worse (20 % right"),
    ({"llm": [1] * 10, "slm": [0] * 10, "tau=0.02": [1] * 10}, 2.0, "expect about 2.00 x"),
    ({"llm": [1] * 10, "slm": [0] * 10}, 2.0, "expect about 2.00 x")])
def test_advice(right, alone, told):
    row = {"tau": 0.02, "alone": alone, "together": 1.5}
    assert told in pays.advice(2.5, row, right, 16)


def test_the_command_on_a_file_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    rows = "".join(json.dumps({"question": question(p), "answer": str(p.answer)}) + "\n"
                   for p in problems("dev", 4, 0))
    (tmp_path / "p.jsonl").write_text(rows)
    argv = ["pays", "--problems", tmp_path / "p.jsonl", "--out", tmp_path / "o.jsonl", "--n", 4, "--batch", 2,
            "--max-new-tokens", 40]
    monkeypatch.setattr("sys.argv", list(map(str, argv)))
    pays.main()
    text = capsys.readouterr().out
    assert "a step of   2 rows" in text and "tau=0.02" in text and "of 4," in text
    table = [line.split() for line in text.splitlines() if line.split()[:1] in (["0.001"], ["0.1"])]
    assert [line[0] for line in table] == ["0.001", "0.1"]
    above, share, speed, together = zip(*([float(x) for x in line[1:]] for line in table))
    assert above[0] > above[1] and share[0] > share[1] and speed[0] < speed[1] and min(together) > 0
    task = Task(problems=str(tmp_path / "p.jsonl"), max_new_tokens=40)
    assert len(task.split("any", 9)) == 4
    monkeypatch.setattr(answers, "answer", lambda *_: pytest.fail("answers are there"))
    monkeypatch.setattr("sys.argv", [*map(str, argv), "--minutes", "0"])  # no time to try a tau
    pays.main()
    assert not any(line.startswith("tau=") for line in capsys.readouterr().out.splitlines())
    with pytest.raises(SystemExit):
        monkeypatch.setattr("sys.argv", ["pays", "--try", "2"])
        pays.main()
    assert "tau=2.0: expected a number in [0, 1]" in capsys.readouterr().err
    assert ends_of(task.load()) and torch.get_num_threads() == 1
