"""Tests of the analyses: the domain, the splits, training that survives a kill, the committed pocket pair,
the report."""
import copy
import dataclasses
import itertools
import json
import math
import random
import re
import multiprocessing
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import rstitch
from analysis import bench, collect, compare, demo, frontier, label, latency, train_policy, train_r2r
from analysis.instruments import stats
from analysis.pocket import pair
from analysis.presentation import figures, report
from analysis.instruments.pool import make_pool
from analysis.instruments.provenance import COMMIT, commit
from analysis.instruments.rows import RESULTS, append_row, read_rows
from analysis.instruments.stats import auroc, bootstrap, ratio_of_means, wilson
from analysis.pocket.weights import MODELS, load_pocket
from analysis.instruments.problems import Stated, verify
from analysis.pocket.domain import CORPORA, LIMIT, Problem, SPLITS, carries, question
from analysis.pocket.domain import columns, draw, problems, sentence, solution, stream
from analysis.instruments.task import Task, digest_of, encode_problems, load_latency, solve, where_time_goes
from rstitch_hf import command
from test_rstitch import DEVICES

torch.set_num_threads(1)


# ---- the domain -------------------------------------------------------------------------------------------


def test_values_by_hand():
    problem = Problem(596, (("*", 7), ("-", 120)))  # 596 * 7 = 4172, 4172 - 120 = 4052
    assert problem.values == [596, 4172, 4052] and problem.answer == 4052 and problem.key == "596 *7 -120"


def test_columns_by_hand():
    # 596 * 7: 6*7 = 42; 9*7 + 4 = 67; 5*7 + 6 = 41
    assert columns(596, "*", 7) == [(6, 7, 0, 2, 4), (9, 7, 4, 7, 6), (5, 7, 6, 1, 4)]
    # 502 - 87: 2 - 7 borrows and leaves 5; 0 - 8 - 1 borrows and leaves 1; 5 - 0 - 1 = 4
    assert columns(502, "-", 87) == [(2, 7, 0, 5, 1), (0, 8, 1, 1, 1), (5, 0, 1, 4, 0)]
    assert sentence("Then", 502, "-", 87, 415, worked=True) == (
        "Then, 502 - 87: 2-7-0: 5 borrow 1; 0-8-1: 1 borrow 1; 5-0-1: 4 borrow 0; = 415.")
    assert carries(502, "-", 87) == 2 and carries(111, "+", 222) == 0


@given(st.integers(0, 2**32))
def test_problems_stay_in_bounds_and_columns_state_the_result(seed):
    problem = draw(random.Random(seed))
    assert 2 <= len(problem.steps) <= 4 and all(0 <= v <= LIMIT for v in problem.values)
    for a, (op, n), result in zip(problem.values, problem.steps, problem.values[1:]):
        rows = columns(a, op, n)
        *_, (_, _, _, _, last) = rows
        assert (0 if op == "-" else last) * 10 ** len(rows) + sum(row[3] * 10**i
                                                                  for i, row in enumerate(rows)) == result
        assert op != "-" or last == 0


@given(st.integers(0, 2**32), st.sampled_from(sorted(CORPORA)))
def test_solutions_are_right_and_every_statement_in_them_holds(seed, corpus):
    problem = draw(random.Random(seed))
    text = solution(problem, corpus, random.Random(seed))
    assert verify(problem, text) and not verify(Problem(problem.start, problem.steps + (("+", 1),)), text)
    for a, op, b, result in re.findall(r"\w+, (\d+) (.) (\d+)(?::.*?;)? = (\d+)\.", text):
        assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[op] == int(result)


def test_corpora_differ_as_documented():
    rng = random.Random(0)
    steps = [(a, op, n) for p in problems("dev", 400, 0) for a, (op, n) in zip(p.values, p.steps)]
    easy = [s for s in steps if carries(*s) == 0]
    assert all(CORPORA["short"](*s) == 0 for s in easy) and len(easy) > 50
    # a result of four digits has three carries at most
    assert max(CORPORA["short"](*s) for s in steps) == pytest.approx(0.09)
    styles = [style for p in problems("dev", 400, 0)
              for style in re.findall(r"\w+, \d+ . \d+(:| =)", solution(p, "long", rng))]
    assert len(styles) == len(steps)
    assert abs(styles.count(":") / len(styles) - 0.8) < 4 * math.sqrt(0.8 * 0.2 / len(steps))


def test_verify_reads_the_last_statement():
    problem = Problem(1, (("+", 11), ("+", 12)))
    assert verify(problem, "The answer is 3. The answer is 24.")
    assert not verify(problem, "The answer is 24. The answer is 3.")
    assert not verify(problem, "24") and not verify(problem, "The answer is 24")


def test_splits_are_disjoint_and_training_uses_its_own():
    keys = {split: {p.key for p in problems(split, 4000 if split == "test" else 500, seed=0)}
            for split in SPLITS}
    assert len(keys["test"]) == 4000
    for one, other in itertools.combinations(keys.values(), 2):
        assert not one & other
    texts = {question(p, s) for p in problems("test", 300, 0) for s in range(3)}
    assert all(q not in texts for q, _ in stream("long", seed=0, chunk=0, size=300))
    with pytest.raises(ValueError, match="split='train'"):
        problems("train", 1, 0)


def test_streams_are_reproducible_and_never_repeat_a_chunk():
    one, again, other = (list(stream("short", 0, chunk, 20)) for chunk in (3, 3, 4))
    assert one == again and not set(one) & set(other)


# ---- tokenizer and training -------------------------------------------------------------------------------


def test_tokenizer_covers_the_domain_and_keeps_the_text():
    tokenizer = pair.build_tokenizer()
    for q, s in itertools.chain(stream("short", 5, 0, 200), stream("long", 5, 0, 200)):
        ids = tokenizer(q + "\n" + s).input_ids
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == q + "\n" + s
    assert tokenizer.tokenize("First, 41 * 7 = 287.") == ["First", ",", " 4", "1", " *", " 7", " =", " 2",
                                                          "8", "7", "."]


def test_batches_label_solutions_only():
    tokenizer, recipe = pair.build_tokenizer(), pair.RECIPES["llm"]
    seen = 0
    for ids, labels in pair.batches(tokenizer, recipe, chunk=0, size=64):
        assert ids.shape == labels.shape and (ids.numel() <= recipe.batch_tokens or len(ids) == 1)
        for row, label in zip(ids, labels):
            answer = label[label >= 0]
            prompt = row[:(label >= 0).nonzero()[0, 0]]
            assert tokenizer.decode(prompt).endswith("?\n") and answer[-1] == tokenizer.eos_token_id
            assert torch.equal(row[len(prompt):len(prompt) + len(answer)], answer)
            seen += 1
    assert seen == 64


TINY = pair.Recipe(layers=1, width=16, mlp=16, heads=2, corpus="short", lr=1e-3, init=0.1, chunks=3)


def test_a_killed_training_run_ends_like_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(pair, "dev_accuracy", lambda model, tokenizer: 0.0)
    whole = pair.train("slm", TINY, tmp_path / "whole", size=8)
    train_chunk, calls = pair.train_chunk, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train_chunk(*args)

    monkeypatch.setattr(pair, "train_chunk", killed)
    with pytest.raises(KeyboardInterrupt):
        pair.train("slm", TINY, tmp_path / "parts", size=8)
    assert len(read_rows(tmp_path / "parts" / "log.jsonl")) == 2
    parts = pair.train("slm", TINY, tmp_path / "parts", size=8)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), parts.parameters()))
    with pytest.raises(ValueError, match="starts from llm, which has no checkpoint"):
        pair.train("llm-short", pair.Recipe(**{**TINY.__dict__, "start": "llm"}), tmp_path / "llm-short",
                   size=8)
    further = pair.train("llm-short", pair.Recipe(**{**TINY.__dict__, "start": "whole", "lr": 0.0}),
                         tmp_path / "llm-short", size=8)
    # a learning rate of 0 keeps the start
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), further.parameters()))
    with pytest.raises(ValueError, match="holds 3 chunks of 4"):
        pair.export("slm", pair.Recipe(**{**TINY.__dict__, "chunks": 4}), tmp_path / "parts",
                    tmp_path / "out")
    pair.export("slm", TINY, tmp_path / "parts", tmp_path / "out")
    model, _, tokenizer = rstitch.load_pair(str(tmp_path / "out"), str(tmp_path / "out"), "cpu", "float32")
    for p in whole.eval().parameters():
        p.data = p.data.bfloat16().float()  # rounded as the export rounds
    ids = torch.randint(0, 90, (2, 30), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids).logits, whole(ids).logits)
    assert tokenizer("First, 41").input_ids == pair.build_tokenizer()("First, 41").input_ids
    assert json.loads((tmp_path / "out" / "made.json").read_text())["recipe"]["chunks"] == 3


# ---- intervals and rows -----------------------------------------------------------------------------------


def test_wilson_by_hand():
    # k = 8 of n = 10, z = 1.96: centre (0.8 + z^2/20) / (1 + z^2/10) = 0.7167, half width 0.2268
    assert wilson(8, 10) == (pytest.approx(0.4902, abs=1e-3), pytest.approx(0.9433, abs=1e-3))


def test_auroc_by_hand():
    assert auroc(np.array([1.0, 2.0, 3.0]), np.array([0, 1, 1])) == 1
    assert auroc(np.array([1.0, 2.0, 2.0, 3.0]), np.array([0, 1, 0, 1])) == 0.875  # 3.5 of 4 pairs, one tie
    assert math.isnan(auroc(np.array([1.0]), np.array([1])))


def test_bootstrap_covers_the_truth():
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(100):
        low, high = bootstrap(np.mean, rng.normal(3.0, 1.0, 60), draws=200, seed=seed)
        covered += low <= 3.0 <= high
    assert 85 <= covered <= 100
    assert ratio_of_means(np.array([1, 3]), np.array([4, 4])) == 0.5


def test_rows_survive_a_torn_last_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_row(path, {"a": 1})
    path.write_text(path.read_text() + '{"a": 2')
    assert read_rows(path) == [{"a": 1}]
    append_row(path, {"a": 3})
    assert read_rows(path) == [{"a": 1}, {"a": 3}]


# ---- the committed pair -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pocket():
    return load_pocket()


def test_the_committed_weights_are_small_safetensors_in_bfloat16():
    from safetensors import safe_open
    files = [f for f in MODELS.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 24e6
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".pth", ".pkl")]
    for role in ("slm", "llm", "llm-short"):
        with safe_open(MODELS / role / "model.safetensors", "pt") as weights:
            assert {weights.get_tensor(k).dtype for k in weights.keys()} == {torch.bfloat16}
        assert json.loads((MODELS / role / "made.json").read_text())["recipe"] == pair.RECIPES[role].__dict__


def test_pocket_models_alone_equal_generate(pocket):
    slm, llm, tokenizer = pocket
    ids, mask = encode_problems(tokenizer, problems("dev", 8, seed=1))
    for model, router in ((slm, rstitch.SLMOnly()), (llm, rstitch.LLMOnly())):
        expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=120)
        result = rstitch.stitch(slm, llm, ids, router, attention_mask=mask, max_new_tokens=120)
        assert torch.equal(result.sequences, expected)


def test_stop_strings_work_with_the_pocket_pair(pocket):
    slm, llm, tokenizer = pocket
    ids, _ = encode_problems(tokenizer, problems("dev", 1, seed=1))
    out = llm.generate(ids, custom_generate=rstitch.custom_generate, slm=slm,
                       router=rstitch.EntropyRouter(0.005), max_new_tokens=200,
                       stop_strings=["Finally"], tokenizer=tokenizer)
    assert tokenizer.decode(out[0, ids.shape[1]:]).endswith(" Finally")


@pytest.mark.parametrize("temperature", [0.0, 0.6])
@pytest.mark.parametrize("tau", [0.0, 0.005, 0.02, 0.1, 1.0])
def test_sixteen_rows_together_equal_sixteen_alone(pocket, tau, temperature):
    slm, llm, tokenizer = pocket
    ids, mask = encode_problems(tokenizer, problems("dev", 16, seed=2))
    router, options = rstitch.EntropyRouter(tau), dict(max_new_tokens=28, temperature=temperature)
    together = rstitch.stitch(slm, llm, ids, router, attention_mask=mask, seed=4, **options)
    lms = [rstitch.CachedLM(model, 1, ids.shape[1] + 28) for model in (slm, llm)]
    for b in range(16):
        alone = rstitch.stitch(*lms, ids[b:b + 1][:, mask[b].bool()], router, seed=[together.seed[b]],
                               **options)
        assert [c._replace(entropy=None) for c in alone.calls[0]] == [c._replace(entropy=None)
                                                                      for c in together.calls[b]]
        np.testing.assert_allclose([c.entropy for c in alone.calls[0]],
                                   [c.entropy for c in together.calls[b]], atol=1e-4)
    [lm.close() for lm in lms]


def test_solve_counts_what_it_says(pocket):
    slm, llm, tokenizer = pocket
    todo = problems("dev", 6, seed=3)
    solved = solve(pocket, todo, rstitch.EntropyRouter(0.02), batch_size=4)
    assert [s["correct"] for s in solved] == [verify(p, s["text"]) for p, s in zip(todo, solved)]
    for s in solved:
        assert s["tokens"] == sum(c.kept
                                  for c in s["calls"]) == len(tokenizer(s["text"]).input_ids) + s["finished"]
        assert s["llm_tokens"] == sum(c.model == rstitch.LLM for c in s["calls"])


def test_report_resumes_and_states_every_design_property(tmp_path, capsys):
    path = tmp_path / "pair.jsonl"
    for row in read_rows(report.RESULTS / "pair.jsonl"):
        # what takes minutes comes from the committed rows, and must not be computed again
        if row["what"] != "method":
            append_row(path, row)
    rows = report.run(path, n=4, taus=(0.02,), workers=1)
    text = path.read_text()
    report.run(path, n=4, taus=(0.02,), workers=1)
    assert path.read_text() == text
    assert {r.get("method") for r in rows} == {None, "SLM", "LLM", "LLM-short", "R-Stitch", "random"}
    assert all(r["commit"] is None or len(r["commit"]) >= 7 for r in rows)
    assert all(r["source"] == "measured" for r in rows)
    report.show(rows)
    out = capsys.readouterr().out
    assert out.count("holds") + out.count("FAILS") == 5


def test_the_table_compares_every_method_on_the_same_problems(pocket):
    with demo.make_pool(1) as pool:
        rows = {r["method"]: r for r in demo.table(pool, n=2, n_latency=1, seed=0)}
    assert list(rows)[:3] == ["SLM alone", "LLM alone", "LLM trained short"]
    assert [name.split(",")[0] for name in list(rows)[3:]] == ["R-Stitch",
                                                               "random"] * len(demo.TAUS) + ["R-Stitch+",
                                                                                             "R2R"]
    for name, router in (("SLM alone", rstitch.SLMOnly()),
                         ("R-Stitch, tau 0.02", rstitch.EntropyRouter(0.02))):
        solved = solve(pocket, problems("test", 2, 0), router)
        assert rows[name]["tokens"] == np.mean([s["tokens"] for s in solved])
        assert rows[name]["accuracy"] == np.mean([s["correct"] for s in solved])
        assert rows[name]["latency_tokens"] == solved[0]["tokens"]
    for r in rows.values():
        assert r["speed_up"] == pytest.approx(rows["LLM alone"]["latency_ms"] / r["latency_ms"])
        assert r["speed_up"] == pytest.approx(r["shorter"] * r["cheaper"])
        assert r["n"] == 2 and r["n_latency"] == 1 and r["latency_ms"] > 0 and r["command"]
    text = demo.show(list(rows.values()))
    assert all(name in text for name in rows) and "n = 2 test problems" in text and "\033" not in text


# ---- what an analysis runs on -----------------------------------------------------------------------------


def test_problems_of_a_file_are_split_and_graded(tmp_path):
    rows = [{"question": f"what is {i} halves?", "answer": f"\\frac{{{i}}}{{2}}"} for i in range(40)]
    rows[7]["split"] = "test"
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Task(problems=str(tmp_path / "p.jsonl"))
    parts = {name: task.split(name, 99) for name in ("router-train", "dev", "calibration", "test")}
    assert sorted(p.question for part in parts.values()
                  for p in part) == sorted(row["question"] for row in rows)
    assert Stated("what is 7 halves?", "\\frac{7}{2}") in parts["test"]
    assert len(parts["router-train"]) > 20
    assert task.split("router-train", 2) == parts["router-train"][:2]
    assert question(parts["test"][0]) == parts["test"][0].question
    assert verify(Stated("?", "\\frac{7}{2}"), "it is \\boxed{3.5}")
    assert not verify(Stated("?", "\\frac{7}{2}"), "it is \\boxed{3}")
    (tmp_path / "one.jsonl").write_text(json.dumps(rows[7]) + "\n")
    with pytest.raises(ValueError, match="has no problem in its dev split"):
        Task(problems=str(tmp_path / "one.jsonl")).split("dev", 1)
    with pytest.raises(ValueError, match="line 1 has split 'train': expected"):
        (tmp_path / "one.jsonl").write_text(json.dumps(rows[7] | {"split": "train"}) + "\n")
        Task(problems=str(tmp_path / "one.jsonl")).split("test", 1)


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


@pytest.mark.parametrize("module", [collect, compare, figures, label, latency, pair, train_policy, train_r2r,
                                    bench, frontier])
def test_options_cannot_be_abbreviated(module, monkeypatch, capsys):
    argv = ["--train", "slm", "--thread", "1"] if module is pair else ["--devic", "cpu"]
    monkeypatch.setattr("sys.argv", ["module", *argv])
    with pytest.raises(SystemExit):
        module.main()
    assert f"unrecognized arguments: {argv[-2]}" in capsys.readouterr().err


def test_a_worker_asks_git_for_nothing(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("a worker ran git"))
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    monkeypatch.setenv("RSTITCH_COMMIT", "abc1234")
    assert commit() == "abc1234"


def test_workers_know_the_commit():
    if COMMIT is None:
        pytest.skip("not in git")
    with make_pool(2) as pool:
        assert pool.submit(commit).result() == COMMIT


def test_the_command_leaves_the_threads_as_they_were(capsys):
    torch.set_num_threads(2)
    try:
        command.main(["--max-new-tokens", "2", "Ann has 5 coins."])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


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


# ---- latency, policies, frontier --------------------------------------------------------------------------


def test_latency_is_fitted_checked_and_read_back(tmp_path, pocket, capsys):
    measured = latency.measure(pocket, problems("dev", 3, 0), max_len=330, rounds=2)
    assert {t["method"] for t in measured["trajectories"]} == set(latency.METHODS)
    assert len(measured["trajectories"]) == len(latency.METHODS)  # of three problems the second
    row = latency.evaluate(measured) | {"seed": 0, "device": "cpu", "dtype": "float32", "torch": "x"}
    (tmp_path / "latency.json").write_text(json.dumps(row))
    slm, llm = load_latency(tmp_path / "latency.json")
    assert slm.coefficients == {k: tuple(v) for k, v in row["slm"].items()}
    assert llm.decode(50) > slm.decode(50) > 0
    latency.plot(row, tmp_path / "latency.png")
    assert (tmp_path / "latency.png").stat().st_size > 10_000
    assert all(name in latency.show(row) for name in latency.METHODS)


def test_overhead_names_its_parts(pocket):
    row = latency.overhead(pocket, repeats=2, tokens=5)
    assert 0 < row["entropy"]["ms"] < row["step, entropy rule"]["ms"]
    assert row["forward"]["ms"] < row["step, policy asked"]["ms"]
    assert row["loop, per token"]["share"] == 1 and row["loop_ms"] > 0


def test_held_out_points_are_not_those_of_the_profile_and_all_fit():
    profile, held = latency.grid_points(384), latency.held_out_points(384)
    assert all(n + kv <= 384 for n, kv in profile + held) and len(set(held) & set(profile)) <= 1
    assert {n == 1 for n, _ in held} == {True, False}


def test_steps_of_a_trajectory_by_hand():
    """Results at 1, 3 and 6 ms, then at 1, 2 and 9 ms: the second step took 2 and 1 ms, the third 3 and 7."""
    calls = [rstitch.Call(rstitch.SLM, 0, 10, 0, 5, 0.1, True),
             rstitch.Call(rstitch.SLM, 1, 1, 10, 6, 0.9, False),
             rstitch.Call(rstitch.LLM, 1, 11, 0, 7, 0.1, True)]
    steps = latency.step_samples(calls, [[0.001, 0.003, 0.006], [0.001, 0.002, 0.009]])
    assert [s[:2] for s in steps["slm"] + steps["llm"]] == [(1, 10), (11, 0)]
    assert [s.ms for s in steps["slm"] + steps["llm"]] == pytest.approx([1.5, 5.0])


def test_trajectory_figures_by_hand():
    # measured is 1.2 x fitted
    figures = latency.trajectory_figures(np.array([1.0, 2.0, 3.0]), np.array([1.2, 2.4, 3.6]))
    assert figures["factor"] == pytest.approx(1.2)
    assert figures["median_error"] == pytest.approx(1 / 6)  # 1 / 1.2 - 1
    assert figures["r2_after_factor"] == pytest.approx(1)
    assert figures["median_error_after_factor"] == pytest.approx(0)
    # residuals 0.2, 0.4, 0.6: squares 0.56; measured about its mean 2.4: 1.44 + 0 + 1.44 = 2.88; R^2 = 1 -
    # 0.56 / 2.88
    assert figures["r2"] == pytest.approx(1 - 0.56 / 2.88)


def test_frontier_by_hand():
    # at 0.8 one is slower than a more accurate one, at 0.4 too; (0.7, 25) is on the front, but above the
    # chord, 20 at 0.7
    points = np.array([[0.8, 40.0], [0.9, 30.0], [0.7, 25.0], [0.5, 10.0], [0.4, 12.0]])
    assert [x.tolist() for x in stats.front(points)] == [[0.5, 0.7, 0.9], [10, 25, 30]]
    assert [x.tolist() for x in stats.front(points, mixtures=True)] == [[0.5, 0.9], [10, 30]]
    assert stats.frontier_gap((0.8, 22.0), points) == pytest.approx(0.2)  # 1 - 22 / 27.5
    assert stats.frontier_gap((0.8, 22.0), points, mixtures=True) == pytest.approx(0.12)  # 1 - 22 / 25
    assert stats.frontier_gap((0.95, 30.0), points) == 0
    assert stats.frontier_gap((0.3, 11.0), points) == pytest.approx(-0.1)
    assert stats.frontier_gap((0.3, 2.0), points) == 0  # fast, but less accurate than anything on the front


@given(st.lists(st.tuples(st.integers(0, 1000).map(lambda k: k / 1000), st.floats(1, 100)), min_size=1,
                max_size=12), st.floats(0, 1))
def test_nothing_fixed_beats_the_frontier_and_no_mixture_the_hull(points, w):
    points = np.array(points)
    for a in points:
        assert stats.frontier_gap(tuple(a), points) <= 1e-9
        for b in points:
            assert stats.frontier_gap(tuple(w * a + (1 - w) * b), points, mixtures=True) <= 1e-6
    for mixtures in (False, True):
        x, y = stats.front(points, mixtures)
        assert {*zip(x, y)} <= {*map(tuple, points)} and (np.diff(x) > 0).all() and (np.diff(y) > 0).all()


def test_gap_and_its_interval_know_a_method_that_is_better():
    rng = np.random.default_rng(0)
    n = 400
    right = rng.random((3, n)) < np.array([[0.5], [0.8], [0.95]])
    ms = rng.normal(1, 0.1, (3, n)) * np.array([[10], [30], [60]])
    fixed = np.stack([right, ms], 2)
    faster = np.stack([right[1], 0.8 * ms[1]], 1)[None]
    gap, low, high = stats.gap_with_interval(faster, fixed)
    assert gap == pytest.approx(0.2, abs=0.01) and 0 < low <= gap <= high < 0.35
    same, low, high = stats.gap_with_interval(fixed[1:2], fixed)
    assert same == pytest.approx(0, abs=0.05) and low <= 0 <= high + 1e-9


def test_rows_of_other_weights_or_times_are_computed_anew(tmp_path):
    task = Task(policies=str(tmp_path))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "policy.safetensors").write_bytes(b"a")
    policy, fixed = frontier.made_with(task, "policy", "one"), frontier.made_with(task, "fixed", "tau 0.02")
    (tmp_path / "one" / "policy.safetensors").write_bytes(b"b")
    assert frontier.made_with(task, "policy", "one") != policy
    assert frontier.made_with(task, "fixed", "tau 0.02") == fixed
    assert frontier.made_with(timed(tmp_path, policies=str(tmp_path)), "fixed", "tau 0.02") != fixed
    assert frontier.made_with(dataclasses.replace(task, max_new_tokens=9), "fixed", "tau 0.02") != fixed


def test_a_policy_is_calibrated_by_what_it_earns(tmp_path, pocket, monkeypatch):
    """Above -30 the LLM is called wherever the policy is asked, as R-Stitch does; above 30 nowhere. Which
    earns more decides."""
    monkeypatch.setattr(frontier, "ABOVE", (-30.0, 30.0))
    monkeypatch.setattr(frontier, "N_CALIBRATION", 12)
    task, todo = timed(tmp_path), problems("calibration", 12, 0)
    lam = json.loads((task.path("policies") / frontier.BASE / "made.json").read_text())["lam"]
    row = frontier.calibrated_row(task, frontier.BASE, 3)
    earned = [train_policy.rewards(solve(pocket, todo, router), lam, MODELS_MS)[0].mean()
              for router in (rstitch.EntropyRouter(0.02), rstitch.SLMOnly())]
    assert [point[1] for point in row["curve"]] == pytest.approx(earned) and earned[0] != earned[1]
    assert row["above"] == (-30.0, 30.0)[int(np.argmax(earned))]
    assert (row["kind"], row["n"]) == ("calibrated", 3)


def test_ablations_compare_on_the_same_problems():
    llm = [[1, 400.0]] * 4
    base, changed = [[1, 100.0], [0, 50.0], [1, 100.0], [1, 110.0]], [[1, 80.0], [0, 50.0], [0, 40.0],
                                                                      [1, 90.0]]
    rows = [{"kind": "policy", "name": name, "outcomes": outcomes}
            for name, outcomes in ((frontier.BASE, base), ("hand-back", changed))]
    text = frontier.ablations([*rows, {"kind": "fixed", "name": "LLM alone", "outcomes": llm}])
    # right: -1 of 4; ms: (-20 + 0 - 60 - 20) / 4. Reward at kappa 0.35, 0.000875 a ms: + 0.0175, 0, - 0.9125,
    # + 0.0175, in all - 0.8775
    assert "| hand-back | kappa0.35-seed0 | 0.35 | 50.0 | 65.0 | -25.0 [-75.0, +0.0] | -25.0 [" in text
    assert "| -21.9 [" in text
    assert "no-context" not in text  # it has no row here


FAST = train_policy.Config(prompts=3, rollouts=2, iterations=3, dev_every=1, dev=4, width=8, minibatches=2)
MODELS_MS = rstitch.LatencyModel((0, 0, 0.01, 1.0),
                                 (0.001, 1.0)), rstitch.LatencyModel((0, 0, 0.05, 4.0), (0.002, 4.0))


def timed(folder, **options) -> Task:
    """The pocket pair with latencies of its own."""
    (folder / "latency.json").write_text(json.dumps(dict(zip(("slm", "llm"),
                                                             (model.coefficients for model in MODELS_MS)))))
    return Task(latency=str(folder / "latency.json"), **options)


@pytest.mark.parametrize("hand_back", [False, True])
def test_an_interrupted_policy_run_equals_an_uninterrupted_one(tmp_path, pocket, monkeypatch, hand_back):
    config = dataclasses.replace(FAST, hand_back=hand_back)
    train_policy.train(config, timed(tmp_path), tmp_path / "whole")
    saved, calls = train_policy.save_checkpoint, []

    def killed(path, *args):  # after the second iteration was logged, before its checkpoint
        calls.append(path.name)
        if calls.count("last.safetensors") == 2 and path.name == "last.safetensors":
            raise KeyboardInterrupt
        saved(path, *args)

    monkeypatch.setattr(train_policy, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        train_policy.train(config, timed(tmp_path), tmp_path / "parts")
    monkeypatch.setattr(train_policy, "save_checkpoint", saved)
    assert len(read_rows(tmp_path / "parts" / "log.jsonl")) == 2
    train_policy.train(config, timed(tmp_path), tmp_path / "parts")
    for name in ("last.safetensors", "best.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    timeless = lambda name: [{k: v for k, v in row.items() if k != "seconds"}
                             for row in read_rows(tmp_path / name / "log.jsonl")]  # noqa: E731
    assert timeless("whole") == timeless("parts")
    assert [row["iteration"] for row in timeless("parts")] == [0, 1, 2]
    untrained = train_policy.build_policies(config, *pocket[:2])
    trained = train_policy.build_policies(config, *pocket[:2])
    assert train_policy.load_checkpoint(tmp_path / "whole" / "last.safetensors", trained) == 3
    moved = {name: not torch.equal(p, q)
             for (name, p), q in zip(trained.named_parameters(), untrained.parameters())}
    # every policy learned something
    assert all(any(moved[name] for name in moved if name.startswith(part)) for part in trained)
    with pytest.raises(ValueError,
                       match="whole holds .* other config: expected {'kappa': 0.35}, got {'kappa': 0.9}"):
        train_policy.train(dataclasses.replace(config, kappa=0.9), timed(tmp_path), tmp_path / "whole")


def test_an_exported_policy_routes_as_it_did_and_refuses_another_pair(tmp_path, pocket):
    config = dataclasses.replace(FAST, iterations=1)
    policies = train_policy.train(config, timed(tmp_path), tmp_path / "run")
    train_policy.export(config, timed(tmp_path), policies, tmp_path / "run", tmp_path / "out")
    todo = problems("dev", 4, seed=5)
    before = solve(pocket, todo, train_policy.build_router(policies, config))
    assert [s["text"]
            for s in solve(pocket, todo,
                           rstitch.PolicyRouter.load(tmp_path / "out", *pocket[:2]))] == [s["text"]
                                                                                          for s in before]
    with pytest.raises(ValueError, match="was made for another SLM"):
        rstitch.PolicyRouter.load(tmp_path / "out", pocket[1], pocket[1])
    with pytest.raises(ValueError, match="was made for another LLM"):
        rstitch.PolicyRouter.load(tmp_path / "out", pocket[0], pocket[0])


@pytest.mark.parametrize("minibatches", [1, 2])
def test_every_decision_gets_the_advantage_of_its_own_answer(minibatches):
    """`update` against a loop over single decisions: 4 prompts of 3 answers, one group dropped, two policies,
    drifted probabilities."""
    config = train_policy.Config(hand_back=True, epochs=1, minibatches=minibatches)
    generator = torch.Generator().manual_seed(0)
    policies = torch.nn.ModuleDict({name: rstitch.Policy(4, 8) for name in ("call", "back")})
    for p in policies.parameters():
        torch.nn.init.normal_(p, std=0.5, generator=generator)
    router = rstitch.PolicyRouter(policies["call"], 0.02, seed=0, back=policies["back"])
    for decisions in (router.decisions, router.back.decisions):
        for rows in ([11, 0, 5], [5], [2, 7, 8, 11, 1], [0, 10]):
            k = len(rows)
            state = (torch.randn(k, 4, generator=generator), torch.rand(k, generator=generator),
                     torch.randint(1, 99, (k,), generator=generator))
            decisions.append(rstitch.Decisions(rows, state, torch.rand(k, generator=generator) < 0.5,
                                               -2 * torch.rand(k, generator=generator)))
    A, keep = torch.randn(4, 3, generator=generator), torch.tensor([True, True, False, True])

    single = []  # (policy, state, call, old log-probability, advantage) of each decision whose group was kept
    for name, decisions in (("call", router.decisions), ("back", router.back.decisions)):
        for d in decisions:
            for i, row in enumerate(d.rows):
                if keep[row // 3]:
                    single.append((name, [x[i:i + 1] for x in d.state], d.action[i:i + 1], d.logp[i],
                                   A[row // 3, row % 3]))
    naive, order = copy.deepcopy(policies), torch.randperm(len(single),
                                                           generator=torch.Generator().manual_seed(7))
    optimizer = torch.optim.SGD(naive.parameters(), lr=0.5)
    for part in order.chunk(minibatches):
        loss = 0.0
        for i in part.tolist():
            name, state, call, old, a = single[i]
            ratio = (rstitch.log_probability(naive[name](*state), call)[0] - old).exp()
            loss = loss - min(ratio * a, ratio.clamp(0.8, 1.28) * a) / len(part)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(naive.parameters(), 1.0)
        optimizer.step()
    figures = train_policy.update(policies, torch.optim.SGD(policies.parameters(), lr=0.5), router, A, keep,
                                  config, torch.Generator().manual_seed(7))
    assert figures["decisions"] == len(single) and figures["clipped"] > 0
    for p, q in zip(policies.parameters(), naive.parameters()):
        torch.testing.assert_close(p, q)


def test_a_group_is_one_problem(tmp_path, pocket, monkeypatch):
    batches, answer = [], train_policy.answer
    monkeypatch.setattr(train_policy,
                        "answer", lambda pair, todo, *args, **options: batches.append((todo, options))
                        or answer(pair, todo, *args, **options))
    train_policy.train(dataclasses.replace(FAST, iterations=2, dev_every=2), timed(tmp_path),
                       tmp_path / "run")
    rollouts = [todo for todo, options in batches if "seed" in options]
    assert len(rollouts) == 2 and all(len(todo) == 6 for todo in rollouts)
    groups = [todo[2 * g:2 * g + 2] for todo in rollouts for g in range(3)]
    assert all(a == b for a, b in groups) and len({a for a, _ in groups}) == 6  # and no problem comes twice


@pytest.mark.parametrize("device", DEVICES)
def test_the_update_raises_what_was_rewarded(device):
    """One context in which calling is right and one in which it is wrong: after some batches the policy tells
    them apart."""
    config = train_policy.Config(width=16, start=0.5, lr=1e-2)
    policies = torch.nn.ModuleDict({"call": rstitch.Policy(4, 16)}).to(device)
    optimizer = torch.optim.Adam(policies.parameters(), lr=config.lr)
    states, generator = torch.tensor([[1.0, 0, 0, -1], [0, 1.0, -1, 0]],
                                     device=device), torch.Generator().manual_seed(0)
    for _ in range(20):
        kind = torch.arange(32) // 2 % 2  # 16 groups of 2 rollouts of one decision each
        state = states[kind], torch.ones(32, device=device), torch.full((32,), 100, device=device)
        logit = policies["call"](*state).detach()
        call = torch.rand(32, generator=generator).to(device) < logit.sigmoid()
        router = rstitch.PolicyRouter(policies["call"], 0.0, seed=0)
        router.decisions.append(rstitch.Decisions(list(range(32)), state, call,
                                                  rstitch.log_probability(logit, call)))
        right = (call.cpu() == (kind == 0)).float().view(16, 2)
        train_policy.update(policies, optimizer, router, rstitch.group_advantages(right),
                            train_policy.kept_groups(right, right > 0, "reward"), config, generator)
    p = policies["call"](states, torch.ones(2, device=device),
                         torch.tensor([100, 100], device=device)).sigmoid().tolist()
    assert p[0] > 0.8 and p[1] < 0.2


def test_dynamic_sampling_by_hand():
    total = torch.tensor([[0.5, 0.6], [0.0, 0.0], [0.7, 0.7], [0.0, 0.7]])
    correct = total > 0
    assert train_policy.kept_groups(total, correct, "reward").tolist() == [True, False, False, True]
    assert train_policy.kept_groups(total, correct, "accuracy").tolist() == [False, False, False, True]
    assert train_policy.kept_groups(total, correct, "off").tolist() == [True] * 4


def test_lambda_is_given_or_follows_from_kappa():
    assert train_policy.price(train_policy.Config(kappa=0.5), 250.0) == 0.002
    assert train_policy.price(train_policy.Config(lam=0.01), 250.0) == 0.01


def test_rewards_with_and_without_the_gate():
    call = rstitch.Call(rstitch.LLM, 0, 1, 0, 5, 0.0, True)  # 4 ms
    solved = [{"calls": [call] * 25, "correct": True}, {"calls": [call] * 50, "correct": False}]
    total, ms = train_policy.rewards(solved, 0.001, MODELS_MS)
    assert ms.tolist() == [100, 200] and total.tolist() == [pytest.approx(0.9), 0]
    assert train_policy.rewards(solved, 0.001, MODELS_MS,
                                gate=False)[0].tolist() == [pytest.approx(0.9), pytest.approx(-0.2)]


@pytest.mark.parametrize("change, message", [
    (dict(rollouts=1), "rollouts=1"), (dict(lam=-1e-3), "lam=-0.001"), (dict(kappa=-0.1), "kappa=-0.1"),
    (dict(tau=2.0), "tau=2.0"), (dict(prompts=0), "prompts=0"),
    (dict(scale="max"), "scale='max'"), (dict(dynamic="no"), "dynamic='no'"),
    (dict(lr=float("nan")), "lr=nan"),
])
def test_policy_runs_with_bad_options_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        train_policy.Config(**change)


# ---- committed figures ------------------------------------------------------------------------------------


def test_committed_figures_carry_their_provenance():
    rows = read_rows(report.RESULTS / "pair.jsonl")
    assert {"SLM", "LLM", "LLM-short"} <= {r.get("method") for r in rows}
    for r in rows:
        assert r["source"] == "measured" and r["command"].startswith("python -m analysis.pair --report")
        assert r["n"] >= 4000 or r["what"] != "method"


def test_the_results_page_shows_the_committed_figures():
    page, rows = (report.RESULTS / "README.md").read_text(), read_rows(report.RESULTS / "pair.jsonl")
    assert len({r["tau"] for r in rows if r.get("method") == "R-Stitch"}) >= 12
    assert report.sweep(rows) in page
    rows = list({(r["kind"], r["name"]): r for r in read_rows(report.RESULTS / "frontier.jsonl")}.values())
    assert frontier.recipes(rows) in page and frontier.ablations(rows) in page


def test_committed_design_properties_hold():
    assert [name for name, _, holds in report.design(read_rows(report.RESULTS / "pair.jsonl"))
            if not holds] == []
