"""Labels for R2R: sentences, judges, stages that survive a kill."""
import dataclasses
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, BertTokenizer

import rstitch
from analysis import label
from analysis.conftest import FAST, TODO
from analysis.instruments.judges import Case, LMJudge, SameAnswer, SameNumbers, SameStatement, Sentences
from analysis.instruments.problems import question
from analysis.instruments.rows import RESULTS, append_row, read_rows
from analysis.instruments.runs import part_of
from analysis.label import (
    Settings,
    closed,
    opening,
    sentence_end,
    sentences,
)
from analysis.pocket.domain import problems
from conftest import tiny
from test_rstitch import DEVICES

EOS = 0


def tokens(*pieces: str):
    """(decode, ids) of a text given in pieces; token 0 is the end, and shows as nothing."""
    names = ["", *dict.fromkeys(p for p in pieces if p)]
    return lambda ids: "".join(names[i] for i in ids), [names.index(p) for p in pieces]


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


def test_same_numbers_by_hand():
    """Wording, order and repetition do not count, nor steps on the way to the same result; an empty text and
    one without a number have not been judged."""
    verdicts = {("She sells 9 * 2 = $18 a day.", "So that is 2 * 9 = 18 dollars."): True,
                ("12 * 5 / 6 = 2 * 5 = 10", "12 * 5 / 6 = 12 * 0.8333 = \\boxed{10}"): True,
                ("12 * 5 / 6 = 10", "12 * 5 / 6 = 11"): False,
                ("so 3 + 4 = 15 + 60", "so 3 + 4 = 15 + 60 = 75"): False,  # the first has no result yet
                ("it is = 15 + 6", "6 + 15 it is"): True, ("x = 1,200", "x = 1200.00"): True,
                ("5 + 3 = 8", "8 = 5 + 3"): True, ("He has 3 dogs and 3 cats.", "3 dogs"): True,
                ("half is .5", "half is 0.5"): True, ("First, we add.", "Then, we add."): None,
                ("", "5"): None, ("5", " "): None, ("We add 5.", "We add."): None, ("5", "6"): False}
    assert SameNumbers()([case(*pair) for pair in verdicts]) == list(verdicts.values())


def test_same_numbers_with_embeddings_by_hand():
    """Cosines of 1, 0.6 and 0 against a limit of 0.6: what lies far apart is another meaning, whatever its
    numbers; where one text has none the cosine decides."""
    at = {"a": [1.0, 0.0], "b": [0.6, 0.8], "c": [0.0, 1.0], "a 5": [1.0, 0.0], "b 6": [0.6, 0.8],
          "c 5": [0.0, 1.0]}
    judge = SameNumbers(lambda texts: torch.tensor([at[text] for text in texts]), 0.6)
    pairs = {("a", "a"): True, ("a", "b"): True, ("a", "c"): False, ("a 5", "a 5"): True,
             ("a 5", "b 6"): False, ("a 5", "c 5"): False, ("a 5", "b"): True, ("a 5", "c"): False}
    assert judge([case(*pair) for pair in pairs]) == list(pairs.values())


def test_embeddings_are_means_of_hidden_states_whatever_the_padding(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "we", "add", "five", "and", "six"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=16)
    torch.manual_seed(0)
    BertModel(config).save_pretrained(tmp_path)
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    embed, texts = Sentences(str(tmp_path), "cpu"), ["we add five and six", "we add"]
    both = embed(texts)
    for line, text in zip(both, texts):
        ids = torch.tensor([[2, *(words.index(word) for word in text.split()), 3]])
        mean = embed.model(input_ids=ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(line, mean / mean.norm(), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(both[0], both[1], atol=1e-2)


def test_a_model_that_says_anything_else_has_not_judged():
    verdicts = {"same": True, " Different.": False, "**Same**": True, "": None, "same or different": None,
                "not the same": None, "yes": None, "samely": None,
                "I cannot tell whether A and B are the same": None, "<think>\nDo A and B mean the same": None}
    assert [LMJudge.verdict(said) for said in verdicts] == list(verdicts.values())


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
    code = ("import sys; from pathlib import Path; from analysis import label; from analysis.conftest import "
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


def test_other_settings_and_problems_are_refused(labelled, tmp_path_factory):
    with pytest.raises(ValueError,
                       match="holds labels of other settings: expected .*'block': 3.*, got .*'block': 4"):
        label.make_labels(dataclasses.replace(FAST, block=4), TODO, labelled[0])
    with pytest.raises(ValueError, match="holds labels of other problems: its router-train has"):
        label.make_labels(FAST, TODO[::-1], labelled[0])
    cut = tmp_path_factory.mktemp("cut")  # two ranks were killed in the first stage, with other problems
    append_row(part_of(cut / "answers.jsonl", 0), {"at": 1, **TODO[0], "answer": [5]})
    with pytest.raises(ValueError, match="holds labels of other problems: its router-train has"):
        label.make_labels(FAST, TODO, cut)
    # where memory ran out
    assert label.make_labels(dataclasses.replace(FAST, rows=5), TODO, labelled[0]) == labelled[1]
    with pytest.raises(ValueError, match="--rows=0: expected an integer, 1 or more"):
        Settings(rows=0)


def test_more_problems_go_on_from_those_that_are_there(tmp_path, labelled):
    label.make_labels(FAST, TODO[:6], tmp_path)
    assert label.make_labels(FAST, TODO, tmp_path) == labelled[1]
    assert bytes_of(tmp_path) == bytes_of(labelled[0])


def published(path, rows, **changes):
    """Labels of the first problems of their splits, the last row changed; None: without this field."""
    lines = [{**{name: row[name] for name in ("split", "answer", "branches", "labels")}, "problem": 0}
             for row in rows]
    lines[-1] = {name: value for name, value in (lines[-1] | changes).items() if value is not None}
    append_row(path, *lines)
    return path


def test_published_labels_need_the_readings_only(tmp_path, labelled, monkeypatch):
    """One problem of each split, the last first; killed before the last file was written."""
    rows, folder = labelled[1][::2][::-1], tmp_path / "labels"
    file = published(tmp_path / "published.jsonl", rows)
    chosen = label.lay_out(file, FAST, TODO, folder)
    (folder / "labels.jsonl").unlink()
    assert chosen == label.lay_out(file, FAST, TODO, folder)
    for stage in ("answers", "branches", "labels"):
        monkeypatch.setitem(label.STAGES, stage, lambda settings, rows: pytest.fail("is there already"))
    made = label.make_labels(FAST, chosen, folder)
    assert made == [row | {"entropy": pytest.approx(row["entropy"], rel=2e-3)} for row in rows]
    other = published(tmp_path / "other.jsonl", rows, labels="U" * len(rows[-1]["labels"]))
    with pytest.raises(ValueError, match="labels holds other labels than --published .*: take another"):
        label.lay_out(other, FAST, TODO, folder)


@pytest.mark.parametrize("changes, message", [
    ({"problem": 2}, "row 2 is of router-train problem 2: expected one of the problems that are labelled"),
    ({"problem": -1}, "problem -1: expected"), ({"split": "train"}, "row 2 is of train problem 0: expected"),
    ({"labels": "I"}, "row 2 has 1 labels of"), ({"labels": None}, "row 2 has no labels: expected split,"),
    (None, "expected rows of labels, found none")])
def test_published_labels_that_do_not_fit_are_refused(tmp_path, labelled, changes, message):
    file = tmp_path / "published.jsonl"
    if changes:
        published(file, labelled[1][:2], **changes)
    with pytest.raises(ValueError, match=message):
        label.lay_out(file, FAST, TODO, tmp_path / "labels")
    assert not (tmp_path / "labels").exists()


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
