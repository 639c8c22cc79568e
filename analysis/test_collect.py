"""Trajectories and interventions: what notebooks 1 and 2 draw."""
import dataclasses
import json

import pytest
import torch

import rstitch
from analysis import answers, collect
from analysis.instruments.problems import question, verify
from analysis.instruments.task import Task
from analysis.pocket.domain import problems
from analysis.pocket.weights import load_pocket

FAST = collect.Settings(sampled=2, samples=2, continuations=2, continued=1, block=2, every=7)


def test_interventions_equal_generate(tmp_path):
    slm, llm, tokenizer = load_pocket()
    todo = problems("test", 4, 3)
    rows = collect.collect(FAST, collect.pocket_rows(4, 3), tmp_path, seed=3)
    assert any(r["right"] for r in rows)
    for r, problem in zip(rows, todo):
        prompt, _ = rstitch.encode(tokenizer, question(problem))
        answer = slm.generate(prompt, max_new_tokens=320, do_sample=False)[0, prompt.shape[1]:].tolist()
        assert r["slm_tokens"] == answer
        assert r["slm"] == verify(problem, tokenizer.decode(answer, skip_special_tokens=True))
        assert len(r["H"]) == len(answer)
        assert bool(r["right"]) == (r["llm"] and not r["slm"]) and len(r["right"]) in (0, len(answer) + 1)
        for t, letter in enumerate(r["right"]):
            if letter == "-":
                assert t % FAST.every and t != len(answer)
            else:
                ids = torch.cat([prompt, torch.tensor([answer[:t]], dtype=torch.long)], 1)
                done = ids if t == len(answer) else llm.generate(ids, max_new_tokens=320, do_sample=False)
                assert (letter == "1") == verify(
                    problem, tokenizer.decode(done[0, prompt.shape[1]:], skip_special_tokens=True))
    assert sum(bool(r["sampled"]) for r in rows) == 1 and [len(r["samples"]) for r in rows] == [2, 2, 0, 0]
    before = {name: (tmp_path / name).read_bytes() for name in ("trajectories.jsonl", "interventions.jsonl")}
    for name in before:  # killed in the middle of a row
        (tmp_path / name).write_bytes(before[name][:-9])
    collect.collect(FAST, collect.pocket_rows(4, 3), tmp_path, seed=3)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    with pytest.raises(ValueError, match="holds files of other settings"):
        collect.collect(dataclasses.replace(FAST, every=2), collect.pocket_rows(4, 3), tmp_path, seed=3)
    with pytest.raises(ValueError, match="holds files of 4 problems of seed 3, not of 6 of seed 3"):
        collect.collect(FAST, collect.pocket_rows(6, 3), tmp_path, seed=3)


def test_a_continuation_that_two_places_share_is_written_once(monkeypatch):
    """The LLM would have written 7 8 3 9 where the SLM has 7 8 9 9: what follows the first three tokens is
    another continuation than what follows the first two; all other neighbours share theirs."""
    monkeypatch.setattr(collect, "read_along", lambda *_: ([7, 8, 3, 9], [0.0] * 4))
    assert collect.turns(FAST, [1, 2], [7, 8, 9, 9], [0, 1, 2, 3, 4]) == [3]
    assert collect.turns(FAST, [1, 2], [7, 8, 9, 9], [0, 2, 4]) == [4]
    assert collect.turns(FAST, [1, 2], [7, 8, 9, 9], [0, 1, 2]) == []


def test_answers_that_are_there_are_not_made_again(tmp_path, monkeypatch):
    """With them both files are the same as without, but for the problems behind the second that the LLM alone
    gets right; another limit, another prompt and sampled answers are other answers."""
    file, kept = tmp_path / "problems.jsonl", tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps({"question": question(p), "answer": p.answer, "split": "test"}) + "\n"
                            for p in problems("test", 10, 3)))
    task, settings = Task(problems=str(file)), dataclasses.replace(FAST, sampled=0, continued=0)
    for method, n in (("slm", 10), ("llm", 9)):
        answers.run(task, [method], "test", n, kept)
    # a trained router leaves a row about its net
    answers.run(dataclasses.replace(task, router=str(Task().path("router"))), ["r2r"], "test", 1, kept)
    answers.run(Task(problems=str(file), max_new_tokens=9), ["llm"], "test", 10, kept)
    answers.run(task, ["llm"], "test", 10, kept, temperature=1.0)
    known = collect.answered(settings, collect.file_rows(file), kept, 2)
    fresh = collect.collect(settings, collect.file_rows(file), tmp_path / "fresh")
    alone = [r["id"] for r in fresh if r["llm"] and not r["slm"]]
    assert len(alone) > 2 and [r["id"] for r in known] == list(range(alone[1] + 1))
    own, asked = collect.write_on, []
    monkeypatch.setattr(collect, "write_on", lambda *a: asked.append(type(a[1])) or own(*a))
    again = collect.collect(settings, known, tmp_path / "again")
    assert set(asked) == {rstitch.LLMOnly}  # nobody answers from the beginning
    for mine, other in zip(again, fresh):
        del mine["answered"]
        for name in ("H", "llm_H"):  # rounded twice: to the four digits of a row of answers, then to three
            assert mine.pop(name) == pytest.approx(other.pop(name), rel=0.011)
    assert again == fresh[:len(again)]
    with pytest.raises(ValueError, match="found none to one problem"):
        collect.answered(dataclasses.replace(settings, max_new_tokens=50), collect.file_rows(file), kept, 2)


def test_bad_problems_are_refused(monkeypatch, capsys, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"question": "w3"}\n')
    (tmp_path / "torn.jsonl"
     ).write_text('{"question": "w3", "answer": "1"}\n\n{"question": \n{"question": "w4", "answer": "1"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    for argv, message in ((["--problems", tmp_path / "bad.jsonl"],
                           "line 1 has no answer"), (["--problems",
                                                      tmp_path / "none.jsonl"], "there is no such file"),
                          (["--problems", tmp_path / "torn.jsonl"],
                           "line 3 is no JSON"), (["--problems", tmp_path / "empty.jsonl"], "found none"),
                          (["--n", "0"], "--n=0"), (["--problems", tmp_path / "bad.jsonl", "--n",
                                                     "3"], "--n 3 is of the pocket domain"),
                          (["--wrong", "3"], "--wrong 3: expected --answers beside it"),
                          (["--answers", tmp_path / "bad.jsonl"], "expected the --problems they answer"),
                          (["--temperature", "-1"], "temperature=-1.0"), (["--every", "0"], "--every=0")):
        with pytest.raises(SystemExit):
            monkeypatch.setattr("sys.argv", ["collect", *map(str, argv), "--out", str(tmp_path)])
            collect.main()
        assert message in capsys.readouterr().err


def test_grades():
    file, pocket = {"domain": "file", "question": "?",
                    "answer": "\\frac{1}{2}"}, {"domain": "pocket", "answer": 5}
    assert collect.grade("so it is \\boxed{0.5}", file)
    assert not collect.grade("so it is \\boxed{0.4}", file)
    assert not collect.grade("", file)
    assert collect.grade("The answer is 5.", pocket) and not collect.grade("5", pocket)
    assert collect.grade("1/2", file)
    assert not collect.grade("1/2", file, finished=False)  # cut off, only a closed box counts
