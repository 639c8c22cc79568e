"""Pairs, problems and what comes of a router on them."""
import json

import pytest
import torch

import rstitch
from analysis import frontier
from analysis.conftest import MODELS_MS
from analysis.instruments.problems import question, verify
from analysis.instruments.rows import RESULTS, read_rows
from analysis.instruments.task import (
    Task,
    branches_together,
    digest_of,
    encode_problems,
    solve,
    where_time_goes,
)
from analysis.pocket.domain import problems
from analysis.pocket.weights import MODELS


def test_solve_counts_what_it_says(pocket):
    slm, llm, tokenizer = pocket
    todo = problems("dev", 6, seed=3)
    solved = solve(pocket, todo, rstitch.EntropyRouter(0.02), batch_size=4)
    assert [s["correct"] for s in solved] == [verify(p, s["text"]) for p, s in zip(todo, solved)]
    for s in solved:
        assert s["tokens"] == sum(c.kept
                                  for c in s["calls"]) == len(tokenizer(s["text"]).input_ids) + s["finished"]
        assert s["llm_tokens"] == sum(c.model == rstitch.LLM for c in s["calls"])


def test_a_task_prompts_as_it_is_told(pocket):
    told = Task(instruction="Think.", system="Be brief. ")
    chosen = problems("dev", 3, seed=1)
    plain, changed = encode_problems(pocket[2], chosen), encode_problems(pocket[2], chosen, told)
    assert torch.equal(changed[0], rstitch.encode(pocket[2], *map(question, chosen), system="Be brief. ",
                                                  instruction="Think.")[0])
    assert changed[0].shape[1] > plain[0].shape[1]
    seen = []
    spy = type("Spy", (rstitch.SLMOnly,), {"leave_slm": lambda self, step: seen.extend(step.context.tolist())
                                           or torch.zeros_like(step.token, dtype=torch.bool)})()
    solve(pocket, chosen, spy, max_new_tokens=1, settings=told)
    assert sorted(seen) == sorted(changed[1].sum(1).tolist())


def test_records_mention_prompts_only_where_they_are_not_as_by_default(pocket):
    plain, told = Task(), Task(system="S", template=(("enable_thinking", False),))
    expected = {"system": "S", "template": [["enable_thinking", False]]}
    assert plain.prompting() == {}
    assert told.prompting() == expected == json.loads(json.dumps(told.prompting()))
    assert told.record() == plain.record() | told.prompting()
    assert not {"system", "instruction", "template", "rows"} & plain.record().keys()
    marks = {digest_of(task) for task in (plain, told, Task(instruction="I"), Task(system="S"))}
    assert len(marks) == 4
    committed = {row["made_with"] for row in read_rows(RESULTS / "frontier.jsonl") if row["kind"] == "fixed"}
    assert frontier.made_with(plain, "fixed", "SLM alone") in committed  # the rows are not stale


def test_the_files_of_the_pocket_pair_are_nobody_elses(tmp_path):
    assert Task().path("router") == MODELS / "r2r"
    assert Task().policy() == MODELS / "policies" / "kappa0.35-seed0"
    other = Task(slm="other")
    assert other.path("router") is other.path("control") is other.policy() is None
    for name in ("latency", "out"):
        with pytest.raises(ValueError, match=f"--{name} is missing: expected a"):
            other.needed(name)
    assert Task(slm="other", out=str(tmp_path)).needed("out") == tmp_path


@pytest.mark.parametrize("router", [rstitch.SLMOnly(), rstitch.LLMOnly(), rstitch.EntropyRouter(0.005),
                                    rstitch.RandomRouter(0.3)])
def test_where_time_goes_adds_up(pocket, router):
    for solved in solve(pocket, problems("dev", 3, 6), router, seed=0):
        spent = where_time_goes(solved["calls"], MODELS_MS)
        assert sum(spent.values()) == pytest.approx(rstitch.trajectory_latency(solved["calls"], *MODELS_MS))
        assert (spent["discarded"] > 0) == any(not c.kept for c in solved["calls"])
        assert (spent["LLM"] > 0) == (solved["llm_tokens"] > 0)


def test_where_time_goes_by_hand():
    call = lambda m, n_inf, n_kv, kept=True: rstitch.Call(m, 0, n_inf, n_kv, 0, 0.0, kept)  # noqa: E731
    calls = [call(0, 10, 0), call(0, 1, 10, False), call(1, 11, 0), call(0, 1, 11), call(1, 3, 11)]
    spent = where_time_goes(calls, MODELS_MS)
    # SLM, 0.001 n_kv + 1 a token: kept at 9 and 11, discarded at 10; its prompt costs 0.01 x 10 + 1 - 1.009
    # LLM at 10 and 13
    assert (spent["SLM"], spent["discarded"],
            spent["LLM"]) == pytest.approx((1.009 + 1.011, 1.010, 4.020 + 4.026))
    assert spent["prompt"] == pytest.approx(1.1 - 1.009 + 4.55 - 4.020)
    assert spent["catch-up"] == pytest.approx(4.15 - 4.026)


def test_branches_together_by_hand():
    prompts, lengths = [[5], [6], [5], [6], [5]], [3, 9, 7, 9, 1]
    assert branches_together([0, 1, 2, 3, 4], prompts, lengths) == [2, 0, 4, 1, 3]
    assert branches_together([4, 1, 3], prompts, lengths) == [4, 1, 3]


def test_latency_of_another_dtype_is_refused(tmp_path):
    """The same weights take 2 to 3 times as long in float32 on a machine that knows bfloat16."""
    model = {"prefill": [0, 0, 1, 1], "decode": [0, 1]}
    path = tmp_path / "latency.json"
    path.write_text(json.dumps({"slm": model, "llm": model, "dtype": "bfloat16"}))
    assert Task(latency=str(path), dtype="bfloat16").latencies()[0].decode(9) == 1
    with pytest.raises(ValueError, match="latency.json is of bfloat16: expected that of --dtype float32"):
        Task(latency=str(path)).latencies()
