"""Tests of what makes, trains and compares R2R's router: sentences, judges, labels that survive a kill, the
router, the comparison."""
import dataclasses
import json
import math
import random
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import rstitch
from analysis import compare, label, train_r2r
from analysis.instruments.rows import RESULTS, read_rows
from analysis.pocket.weights import MODELS, load_pocket
from analysis.label import Case, LMJudge, SameAnswer, SameStatement, Settings
from analysis.label import closed, opening, sentence_end, sentences
from analysis.instruments.problems import question
from analysis.pocket.domain import problems
from safetensors.torch import load_file
from analysis.instruments.task import Task, branches_together, solve
from conftest import tiny, words
from test_rstitch import DEVICES

torch.set_num_threads(1)
EOS = 0


def tokens(*pieces: str):
    """(decode, ids) of a text given in pieces; token 0 is the end, and shows as nothing."""
    names = ["", *dict.fromkeys(p for p in pieces if p)]
    return lambda ids: "".join(names[i] for i in ids), [names.index(p) for p in pieces]


# ---- sentences --------------------------------------------------------------------------------------------


def test_sentences_by_hand():
    decode, ids = tokens("It", " is", " 3", ".", "5", " m", ".", " So", " (", "yes", ".)", " \"", "No", "?\"",
                         "\n", "On", ".", "")
    #                     0     1      2    3    4    5     6    7      8     9     10     11    12    13    
    # 14    15    16   17 end
    # the point of 3.5 ends nothing; ".)" and "?\"" belong to their sentence, a line feed alone is none
    assert sentences(decode, ids, [EOS]) == [0, 7, 11, 14]
    assert [sentence_end(decode, ids, 0, t, [EOS]) for t in (0, 3, 6, 7, 10)] == [7, 7, 7, 11, 11]
    # the end of the answer closes the last one, and belongs to it
    assert sentence_end(decode, ids, 15, 15, [EOS]) == 18
    assert sentence_end(decode, ids[:4], 0, 0, [EOS]) is None  # "It is 3." may go on as 3.5
    assert sentence_end(decode, ids, 0, 17, [EOS]) == 18
    assert [opening([0, 7, 11], t) for t in (0, 3, 7, 8, 11, 30)] == [0, 0, 0, 7, 7, 11]


@given(st.lists(st.sampled_from(["a", " b", "3", ".", ". ", ".\n\n", " ", "!", "?)", "\n", " 4"]), min_size=1,
                max_size=40))
def test_sentences_part_the_text_and_end_at_boundaries(pieces):
    decode, ids = tokens(*pieces, "")
    starts = sentences(decode, ids, [EOS]) + [len(ids)]
    assert starts[0] == 0 and all(a < b for a, b in zip(starts, starts[1:]))
    for a, b in zip(starts, starts[1:]):
        text, rest = decode(ids[a:b]), decode(ids[b:])
        assert b == len(ids) or closed(text + rest[:1], 0) or closed(text, 0)
        # no sooner: all but its last token holds no whole boundary
        assert not closed(decode(ids[a:b - 1]), 0)
        for t in range(a, b):
            assert sentence_end(decode, ids, a, t, [EOS]) >= t + 1


# ---- judges -----------------------------------------------------------------------------------------------


def case(own: str, branch: str) -> Case:
    return Case("Ann has 596 coins.", "", own, branch)


def test_same_statement_by_hand():
    worked, once = ("First, 596 * 7: 6*7+0: 2 carry 4; 9*7+4: 7 carry 6; 5*7+6: 1 carry 4; = 4172.",
                    "First, 596 * 7 = 4172.")
    verdicts = {(worked, once): True, (once, worked.replace("= 4172", "= 4272")): False,
                (once, once.replace("*", "+")): False,
                (once, once.replace("First", "Then")): False, (once, f"{once} Then, 4172 - 3 = 4169."): False,
                (once, ""): False,
                (once, once[:-1]): False, (once, "First, 596 * 7 = ."): False,
                ("The answer is 5.", "The answer is 5."): True,
                ("The answer is 5.", "The answer is 6."): False, ("", ""): True,
                ("First, 596 * = 4172.", once): None, (once[:-1], once): None}
    assert SameStatement()([case(*pair) for pair in verdicts]) == list(verdicts.values())


def test_same_answer_by_hand():
    verdicts = {("so 1/2. The answer is 0.5", "thus \\boxed{\\frac{1}{2}}"): True,
                ("The answer is 4.", "The answer is 5."): False,
                ("The answer is 4.", "I give up"): None, ("", "The answer is 4."): None}
    assert SameAnswer()([case(*pair) for pair in verdicts]) == list(verdicts.values())


def test_a_model_that_says_anything_else_has_not_judged():
    verdicts = {"same": True, " Different.": False, "**Same**": True, "": None, "same or different": None,
                "not the same": None, "yes": None, "samely": None,
                "I cannot tell whether A and B are the same": None, "<think>\nDo A and B mean the same": None}
    assert [LMJudge.verdict(said) for said in verdicts] == list(verdicts.values())


# ---- labels -----------------------------------------------------------------------------------------------


FAST = Settings(block=3)
TODO = [{"question": question(p), "split": split} for split in label.SIZES for p in problems(split, 2, 5)]


@pytest.fixture(scope="module")
def pocket():
    return load_pocket()


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    return folder, label.make_labels(FAST, TODO, folder)


def up_to_the_sentence_of(t: int, ids: list[int], tokenizer) -> str:
    """The text to the end of the sentence that holds token t; in this domain a sentence ends where ". "
    stands."""
    text, before = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids, ids[:t]))
    end = text.find(". ", len(before))
    return text if end < 0 else text[:end + 1]


def test_labels_equal_those_made_one_by_one_with_generate(pocket, labelled):
    slm, llm, tokenizer = pocket
    seen = set()
    with torch.no_grad():
        for row in labelled[1][:3]:
            prompt, _ = rstitch.encode(tokenizer, row["question"])
            answer = llm.generate(prompt, max_new_tokens=320, do_sample=False)[0, prompt.shape[1]:].tolist()
            assert row["prompt"] == prompt[0].tolist()
            assert row["answer"] == answer
            assert answer[-1] == tokenizer.eos_token_id
            for t, own in enumerate(answer):
                logits = slm(torch.tensor([prompt[0].tolist() + answer[:t]])).logits[0, -1]
                assert row["slm"][t] == logits.argmax()
                assert row["entropy"][t] == pytest.approx(float(rstitch.entropy(logits)), abs=1e-3)
                if own == row["slm"][t]:
                    assert row["labels"][t] == "I"
                    continue
                start = torch.tensor([prompt[0].tolist() + answer[:t] + [row["slm"][t]]])
                rest = llm.generate(start, max_new_tokens=320, do_sample=False)[0, prompt.shape[1]:].tolist()
                stated = [SameStatement().read(up_to_the_sentence_of(t, ids, tokenizer))
                          for ids in (answer, rest)]
                assert row["labels"][t] == ("N" if stated[0] == stated[1] else "D")
                seen.add(row["labels"][t])
    assert "D" in seen


def test_end_of_answer_is_labelled_like_any_token(pocket, labelled):
    tokenizer, row = pocket[2], labelled[1][0]
    eos, then = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(" Then")
    last = len(row["answer"]) - 1
    assert row["answer"][last] == eos and len(row["labels"]) == len(row["answer"])
    # the SLM would go on where the LLM ends, or end where it goes on
    for t, choice in ((last, then), (5, eos), (0, eos)):
        changed = {**row, "slm": row["answer"][:t] + [choice] + row["answer"][t + 1:]}
        changed |= label.branches(FAST, [changed])[0]
        (at, branch), = changed["branches"]
        assert at == t and branch[0] == choice and (choice == then or branch == [eos])
        assert label.labels(FAST, [changed])[0]["labels"] == "I" * t + "D" + "I" * (last - t)


def test_what_is_cut_off_is_unjudged(labelled):
    row = labelled[1][0]
    # the limit fell inside a sentence
    cut = {**row, "answer": row["answer"][:20], "slm": row["answer"][:19] + [5],
           "entropy": row["entropy"][:20]}
    cut |= label.branches(FAST, [cut])[0]
    assert cut["branches"] == [[19, None]] and label.labels(FAST, [cut])[0]["labels"] == "I" * 19 + "U"
    one = dataclasses.replace(FAST, sentence_tokens=1)  # the continuation is cut off
    early = {**row, "slm": row["answer"][:3] + [5] + row["answer"][4:]}
    assert label.branches(one, [early])[0]["branches"] == [[3, None]]


def test_final_answers_of_what_is_cut_off_are_unjudged(labelled):
    settings, row = dataclasses.replace(FAST, judge="answer", max_new_tokens=60), labelled[1][0]
    short = {**row, "answer": row["answer"][:60], "slm": row["slm"][:59] + [5]}
    short |= label.branches(settings, [short])[0]
    assert short["branches"]
    assert all(branch is None for _, branch in short["branches"])
    assert set(label.labels(settings, [short])[0]["labels"]) == {"I", "U"}
    changed = {**row, "slm": row["answer"][:3] + [5] + row["answer"][4:]}
    # the branch has no more room than the LLM's own answer had
    assert label.branches(settings, [changed])[0]["branches"] == [[3, None]]
    roomy = dataclasses.replace(settings, max_new_tokens=320)
    (t, branch), = label.branches(roomy, [changed])[0]["branches"]
    assert branch[0] == 5
    assert label.labels(roomy, [changed | {"branches": [[t, branch]]}])[0]["labels"][3] in "ND"


def bytes_of(folder) -> dict:
    return {name: (folder / f"{name}.jsonl").read_bytes() for name in label.STAGES}


@pytest.mark.parametrize("seed", range(6))
def test_labelling_killed_anywhere_ends_with_the_same_bytes(tmp_path, labelled, seed):
    """A kill leaves a prefix of what a stage would have written, torn anywhere, and none of the later
    stages."""
    rng, whole = random.Random(seed), bytes_of(labelled[0])
    (tmp_path / "config.json").write_bytes((labelled[0] / "config.json").read_bytes())
    stage = rng.randrange(len(whole))
    for i, (name, content) in enumerate(whole.items()):
        if i <= stage:
            (tmp_path / f"{name}.jsonl").write_bytes(content if i < stage
                                                     else content[:rng.randrange(len(content))])
    label.make_labels(FAST, TODO, tmp_path)
    assert bytes_of(tmp_path) == whole


def test_labelling_survives_kill_9(tmp_path, labelled):
    code = ("import sys; from pathlib import Path; from analysis import label; from analysis.test_r2r import "
            "FAST, TODO; "
            "label.make_labels(FAST, TODO, Path(sys.argv[1]))")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=RESULTS.parent.parent,
                               stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (tmp_path / "answers.jsonl").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(random.Random(0).random() / 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "answers.jsonl").stat().st_size > 0
    label.make_labels(FAST, TODO, tmp_path)
    assert bytes_of(tmp_path) == bytes_of(labelled[0])


def test_a_judge_that_crashes_or_talks_nonsense_loses_nothing(tmp_path, labelled, monkeypatch):
    whole, asked = bytes_of(labelled[0]), []

    class Judge(SameStatement):
        def __call__(self, cases):
            asked.append(len(cases))
            if len(asked) == 2:
                raise RuntimeError("out of memory")
            return super().__call__(cases)

    monkeypatch.setattr(label, "build_judge", lambda *_: judge)
    judge = Judge()
    with pytest.raises(RuntimeError, match="out of memory"):
        label.make_labels(FAST, TODO, tmp_path)
    assert whole["labels"].startswith((tmp_path / "labels.jsonl").read_bytes())
    assert len(read_rows(tmp_path / "labels.jsonl")) == FAST.block
    label.make_labels(FAST, TODO, tmp_path)
    assert bytes_of(tmp_path) == whole
    (tmp_path / "labels.jsonl").unlink()
    judge = lambda cases: [None] * len(cases)  # noqa: E731
    rows = label.make_labels(FAST, TODO, tmp_path)
    for row, before in zip(rows, labelled[1]):
        assert row["labels"] == before["labels"].replace("N", "U").replace("D", "U")
        assert set(row["labels"]) <= {"I", "U"}
    (tmp_path / "labels.jsonl").unlink()
    judge = lambda cases: [True]  # noqa: E731
    with pytest.raises(ValueError, match="gave 1 verdicts on"):
        label.make_labels(FAST, TODO, tmp_path)


def test_other_settings_and_problems_are_refused(labelled):
    with pytest.raises(ValueError,
                       match="holds labels of other settings: expected .*'block': 3.*, got .*'block': 4"):
        label.make_labels(dataclasses.replace(FAST, block=4), TODO, labelled[0])
    with pytest.raises(ValueError, match="holds labels of other problems: its router-train has"):
        label.make_labels(FAST, TODO[::-1], labelled[0])
    # where memory ran out
    assert label.make_labels(dataclasses.replace(FAST, rows=5), TODO, labelled[0]) == labelled[1]
    with pytest.raises(ValueError, match="--rows=0: expected an integer, 1 or more"):
        Settings(rows=0)


def test_more_problems_go_on_from_those_that_are_there(tmp_path, labelled):
    label.make_labels(FAST, TODO[:6], tmp_path)
    assert label.make_labels(FAST, TODO, tmp_path) == labelled[1]
    assert bytes_of(tmp_path) == bytes_of(labelled[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["Qwen2", "Gemma 3"])
def test_teacher_forcing_in_pieces_equals_one_forward(family, device):
    model = tiny.__wrapped__(family, 3).to(device)
    prompt, answer = list(range(2, 9)), [5, 9, 11, 3, 8, 20, 21, 7, 1]
    with torch.inference_mode():
        whole = model(torch.tensor([prompt + answer[:-1]], device=device), output_hidden_states=True)
    pieces = list(label.teacher_forced(model, prompt, answer, chunk=4))
    hidden, logits = (torch.cat(part) for part in zip(*pieces))
    assert len(logits) == len(answer)
    torch.testing.assert_close(logits, whole.logits[0, len(prompt) - 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden, whole.hidden_states[-1][0, len(prompt) - 1:], atol=1e-5, rtol=1e-5)


def test_figures_by_hand(labelled, pocket):
    tokenizer = pocket[2]
    ids = tokenizer(" The answer is 5.", add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    rows = [{"answer": ids, "labels": "INDIIU", "entropy": [0.1, 0.3, 1.0, 0.1, 0.1, 9.0]},
            {"answer": ids, "labels": "IIIIID", "entropy": [0.1] * 5 + [2.0]}]
    figures = label.figures(FAST, rows)
    assert {name: share[0]
            for name, share in figures["shares"].items()} == pytest.approx({"identical": 8 / 12,
                                                                            "neutral": 1 / 12,
                                                                            "divergent": 2 / 12,
                                                                            "unjudged": 1 / 12})
    # 1.0 and 2.0 against eight of 0.1 and one of 0.3
    assert figures["entropy_ratio"][0] == pytest.approx(1.5 / ((8 * 0.1 + 0.3) / 9))
    assert figures["kind"]["end"]["n"] == 2
    assert figures["kind"]["end"]["divergent"] == 0.5
    assert figures["kind"]["word"]["n"] == 6
    assert figures["tokens"] == 12
    assert figures["decile of the answer"]["0"]["identical"] == 1
    assert "paper 5 %" in label.show(figures | {"x": 0})


# ---- the router -------------------------------------------------------------------------------------------


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


def test_branches_read_prompt_and_answer_once(pocket, monkeypatch):
    """All branches of one problem together: prompt, answer and their own tokens, and no more."""
    read, settings, count = [], Settings(rows=2), 0
    plain = rstitch.stitch
    monkeypatch.setattr(rstitch, "stitch", lambda *args, **options: read.append(plain(*args, **options))
                        or read[-1])
    for problem in problems("router-train", 6, 0):
        rows = [{"question": question(problem), "split": "router-train"}]
        for stage in (label.answers, label.readings):
            rows = [row | more for row, more in zip(rows, stage(settings, rows))]
        read.clear()
        (found,) = label.branches(settings, rows)
        count += len(found["branches"])
        (prompt, answer), result = (rows[0]["prompt"], rows[0]["answer"]), read[0]
        written = sum(len(calls) for calls in result.calls)
        assert result.n_read == (0, result.n_read[1])
        assert result.n_read[1] <= len(prompt) + len(answer) + written
    assert count >= 18


def test_branches_together_by_hand():
    prompts, lengths = [[5], [6], [5], [6], [5]], [3, 9, 7, 9, 1]
    assert branches_together([0, 1, 2, 3, 4], prompts, lengths) == [2, 0, 4, 1, 3]
    assert branches_together([4, 1, 3], prompts, lengths) == [4, 1, 3]


@pytest.mark.parametrize("change, message", [
    (dict(width=0), "--width=0"), (dict(dropout=1.0), "--dropout 1.0: expected a number in"),
    (dict(lr=-1.0), "--lr -1.0"), (dict(recall=0.0), "--recall 0.0"),
    (dict(blocks=-1), "--blocks=-1"), (dict(weight_decay=float("nan")), "--weight-decay nan"),
])
def test_router_runs_with_bad_options_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        train_r2r.Config(**change)


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


@pytest.mark.parametrize("argv, message", [
    (["--problems", "none.jsonl", "--judge", "answer"], "there is no such file"), (["--n", "0"], "--n=0"),
    (["--n", "3", "--problems", "x"], "--n 3 is of the pocket domain"),
    (["--problems", "none.jsonl"], "--judge statement reads the pocket domain only"),
    (["--dtype", "bf16"], "invalid choice: 'bf16'"),
    (["--device", "tpu9"], "is no device that torch can use"),
    (["--judge", "nowhere/at/all"], "--judge nowhere/at/all: there is no such folder"),
    (["--workers", "0"], "--workers=0"),
])
def test_bad_options_of_labelling_are_refused(argv, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["label", "--out", str(tmp_path), *argv])
    with pytest.raises(SystemExit):
        label.main()
    assert message in capsys.readouterr().err and not (tmp_path / "answers.jsonl").exists()


# ---- the comparison ---------------------------------------------------------------------------------------


def test_knobs_by_hand():
    knobs, shares, right = [0, 1, 2, 3], [0.0, 0.1, 0.06, 0.2], [0.1, 0.5, 0.7, 0.9]
    # 0.08 lies between the first two (right 0.42), the middle two (0.6) and the last two (0.7 + 0.2 x 0.02 /
    # 0.14), the best
    assert compare.knob_for(0.08, knobs, shares, right) == pytest.approx(2 + 0.02 / 0.14)
    assert compare.knob_for(0.05, knobs, shares, right) == pytest.approx(0.5)
    assert compare.knob_for(0.3, knobs, shares, right) is None


def test_activated_parameters_and_router_time_by_hand():
    row = {"family": "R2R", "slm_passes": 50.0, "llm_passes": 10.0, "tokens": 55.0, "latency_ms": 100.0,
           "asked": 50.0}
    assert compare.activated(row, (1_000_000, 8_000_000)) == pytest.approx((50e6 + 80e6) / 55)
    assert compare.with_router(row, {"R2R": 0.2, "R-Stitch+": 0.3}) == pytest.approx(110)
    assert compare.with_router(row | {"family": "R-Stitch+", "asked": 5.0},
                               {"R2R": 0.2, "R-Stitch+": 0.3}) == pytest.approx(101.5)
    assert compare.with_router(row | {"family": "random"}, {"R2R": 0.2}) == 100


def outcomes(right: list[int], tokens: list[int], large: list[int]) -> dict:
    return {"outcomes": [[r, t, k, 1.0] for r, t, k in zip(right, tokens, large)]}


def test_routers_are_compared_at_the_same_share():
    # 25 % right at 0, 75 % at 10 %
    low, high = outcomes([0, 0, 1, 0], [10] * 4, [0] * 4), outcomes([1, 1, 1, 0], [10, 10, 10, 10],
                                                                    [4, 0, 0, 0])
    once = np.full((1, 4), 0.25)
    assert compare.at_share([high, low], 0.05, once)[0] == pytest.approx(0.5)
    assert compare.at_share([low, high], 0.102, once)[0] == 0.75
    assert np.isnan(compare.at_share([low, high], 0.2, once)[0])  # no run is as large
    lead, least, most = compare.difference([low, high], [low], 0.004, 4)
    assert lead == pytest.approx(2.0) and least <= lead <= most  # 4 % of the way from 25 to 75, against 25
    assert compare.difference([low, high], [low, high], 0.05, 4) == (0, 0, 0)
    assert compare.difference([low, high], [low, high], 0.05, 2)[0] == 0  # over the first two only


def test_signals_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]).log()
    assert compare.gap(logits).tolist() == pytest.approx([0.75, 0.0, 1.0])
    logits = logits.clamp(min=-100)  # -inf would be 0 x inf
    # surprises log 2 and twice log 4 about their mean 1.5 log 2: 0.5 x (0.5 log 2)^2 + 0.5 x (0.5 log 2)^2
    assert compare.varentropy(logits).tolist() == pytest.approx([0.25 * math.log(2) ** 2, 0.0, 0.0], abs=1e-6)


def test_a_signal_router_is_algorithm_1_with_that_signal(pocket):
    todo, log_vocab = problems("dev", 3, seed=4), math.log(pocket[0].config.vocab_size)
    entropy = compare.SignalRouter(lambda logits: rstitch.entropy(logits) / log_vocab, 0.01)
    texts = [[s["text"] for s in solve(pocket, todo, router)]
             for router in (entropy, rstitch.EntropyRouter(0.01))]
    assert texts[0] == texts[1]


def test_speculative_decoding_writes_what_the_llm_writes(pocket):
    todo = problems("dev", 3, seed=4)
    alone = solve(pocket, todo, rstitch.LLMOnly())
    for problem, expected in zip(todo, alone):
        ids, _ = rstitch.encode(pocket[2], question(problem))
        tokens, calls = compare.assisted(pocket, ids, 320)
        assert pocket[2].decode(tokens, skip_special_tokens=True) == expected["text"]
        for m in (rstitch.SLM, rstitch.LLM):  # every token is read once, but for drafts that were refused
            mine = [c for c in calls if c.model == m]
            assert mine[0].n_kv == 0
            assert mine[0].n_inf >= ids.shape[1]
            assert all(c.n_kv <= p.n_kv + p.n_inf for p, c in zip(mine, mine[1:]))
        passes, drafted = len([c for c in calls if c.model == rstitch.LLM]), [c.kept for c in calls
                                                                              if c.model == rstitch.SLM]
        assert passes < len(tokens) / 2
        assert sum(drafted) + passes in (len(tokens), len(tokens) + 1)  # a last pass may have nothing to add
    assert not pocket[0]._forward_pre_hooks and not pocket[1]._forward_pre_hooks


def test_speculative_decoding_of_unlike_widths_and_with_penalties_of_the_llm():
    slm, llm = tiny("Qwen2", 1, scale=3.0, vocab_size=36), tiny("Llama", 2, scale=3.0, vocab_size=40)
    ids = torch.tensor([[5, 6, 7]])
    alone = rstitch.stitch(slm, llm, ids, rstitch.LLMOnly(), max_new_tokens=20)
    llm.generation_config.repetition_penalty = 1.7
    tokens, calls = compare.assisted((slm, llm, words(32)), ids, 20)
    assert tokens == alone.sequences[0, 3:].tolist()
    assert slm.config.vocab_size == 36
    assert llm.generation_config.repetition_penalty == 1.7


def test_refused_drafts_by_hand():
    call = lambda m, n_inf, n_kv: rstitch.Call(m, 0, n_inf, n_kv, -1, 0.0, True)  # noqa: E731
    # a prompt of 10; three drafts, two accepted, and the LLM's own: 13; two drafts, none accepted, and its
    # own: 14
    calls = [call(0, 10, 0), call(0, 1, 10), call(0, 1, 11), call(1, 13, 0), call(0, 1, 12), call(0, 1, 13),
             call(1, 3, 12)]
    assert [c.kept for c in compare.without_refused(calls, 10, 14)] == [True, True, False, True, False, False,
                                                                        True]


def test_one_token_visits_cost_what_stitching_costs_where_answers_stay(pocket):
    """With the SLM as its own LLM, handing back after each token changes nothing in the answer: the
    prediction is what happens."""
    slm, _, tokenizer = pocket
    todo, tau = problems("dev", 4, seed=4), 0.01 * math.log(slm.config.vocab_size)
    alone = solve((slm, slm, tokenizer), todo, rstitch.SLMOnly())
    run = solve((slm, slm, tokenizer), todo, rstitch.EntropyRouter(0.01, tau_back=1.0))
    strip = lambda calls: [(c.model, c.n_inf, c.n_kv, c.token, c.kept) for c in calls]  # noqa: E731
    for a, b in zip(alone, run):
        assert strip(compare.one_token_visits(a["calls"], tau)) == strip(b["calls"]) and b["llm_tokens"] > 0


def test_chosen_taus_bring_what_they_promise_on_the_answers_they_come_from():
    task = Task()
    (share, *_, cost) = compare.choose_taus(task, 20)
    assert (share["wanted"], cost["wanted"]) == ("share", "latency")
    assert share["predicted_share"] == pytest.approx(0.05, abs=0.003)
    assert cost["tau"] < share["tau"] < 0.1
    solved = [s for s in solve(task.load(), task.split("calibration", 20), rstitch.SLMOnly())
              if s["tokens"] <= share["median_tokens"]]
    nats = share["tau"] * math.log(task.load()[0].config.vocab_size)
    H = [c.entropy for s in solved for c in s["calls"]]
    assert np.mean([h > nats for h in H]) == pytest.approx(share["predicted_share"], abs=2 / len(H))
    ms = [rstitch.trajectory_latency(compare.one_token_visits(s["calls"], nats), *task.latencies())
          for s in solved]
    assert np.mean(ms) == pytest.approx(share["predicted_ms"], rel=0.02)


@pytest.mark.parametrize("same, alone", [(True, rstitch.SLMOnly), (False, rstitch.LLMOnly),
                                         (None, rstitch.LLMOnly)])
def test_live_labels_at_the_ends_are_one_model(pocket, monkeypatch, same, alone):
    todo = problems("dev", 3, seed=4)
    router = compare.LiveLabels(FAST, [question(p) for p in todo])
    router.judge = lambda cases: [same] * len(cases)
    assert [s["text"] for s in solve(pocket, todo, router)] == [s["text"]
                                                                for s in solve(pocket, todo, alone())]


def test_live_labels_call_where_a_sentence_would_change(pocket):
    todo = problems("dev", 6, seed=4)
    router, asked = compare.LiveLabels(FAST, [question(p) for p in todo]), []
    judge = router.judge
    router.judge = lambda cases: [asked.append((c, v)) or v for c, v in zip(cases, judge(cases))]
    solved = solve(pocket, todo, router)
    assert sum(v is not True for _, v in asked) == sum(s["llm_tokens"] for s in solved) > 0
    assert all(c.own != c.branch for c, _ in asked) and np.mean([s["correct"] for s in solved]) > 0.6


def test_the_comparison_runs_resumes_and_shows(tmp_path, pocket, monkeypatch):
    monkeypatch.setattr(compare, "FAMILIES",
                        {"R2R": compare.Family(compare.r2r_router, (-12.0, 12.0), "router"),
                         "random": compare.Family(compare.FAMILIES["random"].build, (0.01, 0.9)),
                                              "R-Stitch+": compare.Family(compare.policy_router, (-30.0, 6.0),
                                                                          "policies"),
                                              "R-Stitch": compare.FAMILIES["R-Stitch"]})
    monkeypatch.setattr(compare, "SHARES", (0.1, 0.5))
    again = lambda: compare.run(Task(out=str(tmp_path)), n_calibration=4, n_test=4, n_live=2, n_timed=2,
                                judge="statement", workers=1)  # noqa: E731
    rows = again()
    assert {(r["kind"], r["family"]) for r in rows} >= {("calibration", "R2R"), ("test", "random"),
                                                        ("test", "SLM alone"), ("test", "control"),
                                                        ("live labels", "live labels"),
                                                        ("assisted", "speculative decoding"),
                                                        ("chosen", "R-Stitch"), ("router times", None),
                                                        ("wall-clock", None)}
    monkeypatch.setattr(compare, "measure", None)  # all is there
    assert again() == rows
    text = compare.show(rows, (1, 1), lambda t: 0.123)
    assert text.count("offline 12.3 %") == 2
    assert "live labels:" in text
    assert text.count("random") == 3
    assert "R-Stitch+" in text
    assert text.count("tau ") == 6
    assert compare.table(rows).count("\n") == 3
    assert len(read_rows(tmp_path / "compare.jsonl")) == len(rows) == len(again())


def test_the_results_page_shows_the_committed_comparison():
    rows, readme = read_rows(RESULTS / "compare.jsonl"), (RESULTS / "README.md").read_text()
    assert compare.table(rows) in readme
    assert {r["family"] for r in rows if r["kind"] == "test"} == {*compare.FAMILIES, *compare.ALONE}
    assert all(r["source"] == "measured" and r["n"] == 1000 for r in rows if r["kind"] == "test")
    made, labels = (json.loads((MODELS / "r2r" / "made.json").read_text()),
                    json.loads((RESULTS / "labels.json").read_text()))
    assert labels["n"] >= 2000
    # within a point of usage
    assert all(abs(got - wanted) < 0.01 for wanted, _, got in made["test"]["targets"])
    for name, digits in (("identical", 1), ("neutral", 2), ("divergent", 1)):
        assert "{:.{d}f} % [{:.{d}f}, {:.{d}f}]".format(*(100 * x for x in labels["shares"][name]),
                                                        d=digits) in readme
    for name in ("recall", "usage"):
        assert "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * x for x in made["test"][name])) in readme
