"""Answers as rows: their forward passes come back, a run that was killed goes on, a method that is none is
refused."""
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import rstitch
from analysis import answers
from analysis.instruments.problems import question
from analysis.instruments.rows import read_rows
from analysis.instruments.task import SEED, Task, solve

ROOT = Path(__file__).parent.parent
METHODS = ["slm", "llm", "tau=0.001", "tau=0.02,back=1,window=3", "random=0.3", "r2r", "policy=0.4"]


@pytest.mark.parametrize("method", METHODS)
def test_calls_of_gives_back_every_forward_pass(method):
    """All fields as stitch told them; entropies to the four digits that a row keeps."""
    task = Task()
    router = answers.router_of(method, task)
    for solved in solve(task.load(), task.split("dev", 6), router, seed=SEED):
        back = answers.calls_of(json.loads(json.dumps(answers.row_of(solved["calls"]))))
        assert [call[:5] + call[6:] for call in back] == [call[:5] + call[6:] for call in solved["calls"]]
        assert [call.entropy for call in back] == pytest.approx([call.entropy for call in solved["calls"]],
                                                                rel=1e-3)


def test_rows_are_those_of_solve_whatever_the_batch_and_a_kill(tmp_path):
    """Sampled, two answers to a problem; the second run finds 5 whole rows and a torn one, and other
    slots."""
    path, task = tmp_path / "answers.jsonl", Task(rows=4)
    rows = answers.run(task, ["tau=0.005"], "dev", 6, path, temperature=1.5, samples=2)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:40])
    again = answers.run(Task(rows=3), ["tau=0.005"], "dev", 6, path, temperature=1.5, samples=2)
    assert len(read_rows(path)) == 12 and [r["rows"] for r in read_rows(path)] == [4] * 5 + [3] * 7
    told = [(r["problem"], r["sample"], r["tokens"], r["writer"], r["correct"]) for r in again]
    assert told == [(r["problem"], r["sample"], r["tokens"], r["writer"], r["correct"]) for r in rows]
    assert [(r["problem"], r["sample"]) for r in rows] == [(i, k) for i in range(6) for k in range(2)]
    chosen = [problem for problem in task.split("dev", 6) for _ in range(2)]
    solved = solve(task.load(), chosen, rstitch.EntropyRouter(0.005), seed=SEED,
                   temperature=1.5)
    assert [r["tokens"] for r in rows] == [[call.token for call in s["calls"] if call.kept] for s in solved]
    assert any(a["tokens"] != b["tokens"] for a, b in zip(rows[::2], rows[1::2]))  # samples of a problem


def test_only_what_is_missing_is_answered(tmp_path, monkeypatch):
    """More problems, another limit and another prompt make new rows; what is there stays."""
    path, task, asked = tmp_path / "answers.jsonl", Task(), []
    own = answers.answer
    monkeypatch.setattr(answers,
                        "answer", lambda task, router, todo, *rest: (asked.append([question(p)
                                                                                   for p in todo]),
                                                                     own(task, router, todo, *rest)))
    answers.run(task, ["slm"], "dev", 3, path)
    answers.run(task, ["slm"], "dev", 5, path)
    answers.run(task, ["slm"], "dev", 5, path)
    answers.run(Task(max_new_tokens=100), ["slm"], "dev", 2, path)
    answers.run(Task(instruction="Think."), ["slm"], "dev", 1, path)
    answers.run(Task(instruction="Think."), ["slm"], "dev", 1, path)
    path.write_text("".join(json.dumps(row) + "\n" for row in read_rows(path) if "instruction" in row))
    answers.run(task, ["slm"], "dev", 1, path)  # an option that a row has and the run has not counts, too
    texts = [question(p) for p in task.split("dev", 5)]
    assert asked == [texts[:3], texts[3:], texts[:2], texts[:1], texts[:1]]


def test_an_answer_that_the_limit_cut_off_says_so(tmp_path):
    """Four tokens end no answer of the pocket pair."""
    rows = answers.run(Task(max_new_tokens=4), ["slm"], "dev", 3, tmp_path / "answers.jsonl")
    assert all(not r["finished"] and not r["correct"] and len(r["tokens"]) == 4 for r in rows)


@pytest.mark.parametrize("method", ["", "tau", "tau=2", "tau=x", "back=1,speed=3", "random=1.5", "entropy",
                                    "r2r,back=1"])
def test_a_method_that_is_none_is_refused_in_one_sentence(method):
    with pytest.raises(ValueError, match=r"^--methods .*: expected slm, llm, random=P, r2r\[=T\], policy"):
        answers.router_of(method, Task())


@pytest.mark.parametrize("method", ["r2r=2", "r2r=x", "policy=", "policy=nan"])
def test_a_threshold_that_is_none_is_refused(method):
    with pytest.raises(ValueError, match=f"^--methods {method}: expected .*=T, a threshold in"):
        answers.router_of(method, Task())


def test_trained_routers_stand_at_their_own_threshold_or_another():
    task = Task()
    own = rstitch.R2RRouter.load(task.path("router"), *task.load()[:2]).threshold
    assert answers.router_of("r2r", task).threshold == own != 0.125
    assert answers.router_of("r2r=0.125", task).threshold == 0.125
    assert answers.router_of("policy", task).limit == 0.0
    assert answers.router_of("policy=0.125", task).limit == pytest.approx(-math.log(7))  # odds of 1 to 7
    with pytest.raises(ValueError, match="--router is missing: expected a folder"):
        answers.router_of("r2r", Task(slm=task.llm))


def test_answers_by_another_net_do_not_count(tmp_path):
    """The same threshold and the same problems, but a router whose threshold or weights are not those."""
    path, folder = tmp_path / "answers.jsonl", tmp_path / "router"
    shutil.copytree(Task().path("router"), folder)
    task = Task(router=str(folder))
    own = answers.run(task, ["r2r", "slm"], "dev", 2, path)
    assert answers.run(task, ["r2r", "slm"], "dev", 2, path) == own and len(read_rows(path)) == 5
    made = json.loads((folder / "made.json").read_text())
    (folder / "made.json").write_text(json.dumps(made | {"threshold": 0.9}))
    answers.run(task, ["r2r", "slm"], "dev", 2, path)
    weights = load_file(folder / "router.safetensors")
    weights["head.bias"] += 1e-3
    save_file(weights, folder / "router.safetensors")
    answers.run(task, ["r2r", "slm"], "dev", 2, path)
    nets = [row.get("net") for row in read_rows(path)]  # each was timed once, and has answered twice
    assert len(nets) == 11 and nets.count(None) == 2 and len(set(nets)) == 4


def test_the_time_of_nets_is_told_and_counts(tmp_path):
    """A step of the SLM takes 1 ms and one of the LLM 10. R2R's net is asked at each token of the SLM, the
    policy's where its entropy exceeds tau 0.02, 0.097 nats."""
    task, path = Task(), tmp_path / "answers.jsonl"
    rows = answers.run(task, ["r2r", "policy", "slm"], "dev", 3, path)
    timed = {row["method"]: row for row in read_rows(path) if row["what"] == "net"}
    assert timed.keys() == {"r2r", "policy"} and all(row["ms"]["call"] > 0 for row in timed.values())
    fit = tuple(rstitch.LatencyModel([0, 0, 0, ms], [0, ms]) for ms in (1, 10))
    for row in rows:
        calls = answers.calls_of(row)
        asked = {"r2r": sum(call.model == rstitch.SLM for call in calls), "slm": 0,
                 "policy": sum(call.model == rstitch.SLM and call.entropy > 0.02 * math.log(128)
                               for call in calls)}[row["method"]]
        alone = sum(10 if call.model else 1 for call in calls)
        nets = {timed[row["method"]]["net"]: {"call": 0.5}} if row["method"] != "slm" else {}
        assert asked > 0 or row["method"] == "slm"
        assert answers.milliseconds(row, fit, nets) == pytest.approx(alone + 0.5 * asked)
        assert answers.milliseconds(row, fit) == alone


def test_what_is_printed_keeps_the_samples_of_a_problem_together():
    """Two problems, one always right: from 0 to 100 %, however many samples there are."""
    rows = [{"problem": i, "correct": not i, "finished": True, "tokens": [1, 2], "writer": "SL"}
            for i in range(2) for _ in range(50)]
    assert " 50.0 % right [0.0, 100.0] of 100,  50.0 % LLM tokens" in answers.show("it", rows)


def test_answers_of_unlike_machines_are_not_put_together(tmp_path, monkeypatch):
    """Two ranks: what the other one's machine answered does not count here, which is told."""
    path = tmp_path / "answers.jsonl"
    monkeypatch.setattr("analysis.instruments.runs.meet", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(answers, "machine", lambda device: "another")
    with pytest.raises(ValueError, match="2 answers were made on another kind of machine"):
        answers.run(Task(max_new_tokens=3), ["slm"], "dev", 3, path)  # rank 1 has one of three
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(answers, "machine", lambda device: "this one")
    with pytest.raises(ValueError, match="1 answers were made on another kind of machine than this one"):
        answers.run(Task(max_new_tokens=3), ["slm"], "dev", 3, path)


def test_ctrl_c_ends_with_a_line_and_keeps_the_rows(tmp_path):
    path = tmp_path / "answers.jsonl"
    command = f"-m analysis.answers --methods llm --rows 2 --out {path}".split()
    # A job in the background, as a test run may be one, would hand on that SIGINT is ignored.
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                          preexec_fn=heard) as process:
        while not read_rows(path) and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and told.endswith("stopped; what was written stays\n")
    assert "Traceback" not in told and 1 <= len(read_rows(path)) < 300
