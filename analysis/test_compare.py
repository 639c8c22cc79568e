"""Routers at the same LLM share."""
import json
import math

import numpy as np
import pytest
import torch

import rstitch
from analysis import compare
from analysis.conftest import FAST
from analysis.instruments.problems import question
from analysis.instruments.rows import RESULTS, read_rows
from analysis.instruments.runs import Rows
from analysis.instruments.task import Task, solve
from analysis.pocket.domain import problems
from analysis.pocket.weights import MODELS
from conftest import tiny, words


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


def tokens(*pieces: str):
    """(decode, ids) of a text given in pieces; token 0 is the end, and shows as nothing."""
    names = ["", *dict.fromkeys(p for p in pieces if p)]
    return lambda ids: "".join(names[i] for i in ids), [names.index(p) for p in pieces]


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
    # A run held against its family at the share that the run has in each draw: itself, whatever the draw.
    assert compare.at_own_share(high, [low, high], 4) == (0, 0, 0)
    assert compare.at_own_share(high, [low], 4) == pytest.approx((np.nan,) * 3, nan_ok=True)


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
                        {"R2R": compare.Family(compare.FAMILIES["R2R"].build, (-12.0, 12.0), "router"),
                         "random": compare.Family(compare.FAMILIES["random"].build, (0.01, 0.9)),
                         "R-Stitch+": compare.Family(compare.FAMILIES["R-Stitch+"].build, (-30.0, 6.0),
                                                     "policies"),
                         "R-Stitch": compare.FAMILIES["R-Stitch"]})
    monkeypatch.setattr(compare, "SHARES", (0.1, 0.5))
    task = Task(out=str(tmp_path), max_new_tokens=120)
    again = lambda: compare.run(task, n_calibration=4, n_test=4, n_live=2, n_timed=2, judge="statement",
                                workers=1)  # noqa: E731
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
    # 100.0 % of 300, where R2R at 4.5 % LLM tokens has 58.3 %
    assert "right more often than R2R at this share by +41.7 [" in compare.show(rows, (1, 1), lambda t: 0.1)
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


@pytest.mark.parametrize("rank", range(8))
def test_every_rank_knows_every_job(tmp_path, monkeypatch, rank):
    """With eight ranks some have no share of the six choices; one that is offset may take theirs."""
    taus = [{"wanted": what, "value": value, "tau": 0.01} for what, values in compare.WANTED.items()
            for value in values]
    monkeypatch.setattr(compare, "choose_taus", lambda task, n: taus)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", str(rank))
    store = Rows(tmp_path / "c.jsonl", compare.key_of, lambda key: {})
    jobs = compare.later_jobs(Task(), {}, {"calibration": 1, "test": 1}, {}, store)
    assert len(jobs) == 6 and all(jobs.values())
