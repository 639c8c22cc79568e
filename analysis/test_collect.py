"""Trajectories and interventions: what notebooks 1 and 2 draw."""
import dataclasses

import pytest
import torch

import rstitch
from analysis import collect
from analysis.instruments.problems import question, verify
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
                assert t % 7 and t != len(answer)
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
