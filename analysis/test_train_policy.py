"""Training of R-Stitch+'s policies."""
import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy.special import expit

import rstitch
from analysis import label, train_policy
from analysis.conftest import FAST as LABEL_FAST
from analysis.conftest import MODELS_MS, timed
from analysis.instruments.labelled import read_labels, worth_of_calls
from analysis.instruments.rows import append_row, read_rows
from analysis.instruments.stats import auroc
from analysis.instruments.task import Task, asked, solve
from analysis.pocket.domain import (
    problems,
)
from test_rstitch import DEVICES

FAST = train_policy.Config(prompts=3, rollouts=2, iterations=3, dev_every=1, dev=4, width=8, minibatches=2)
# Without the gate answers that the limit cuts off differ in what they earn, too.
SHORT, CUT = dict(max_new_tokens=80), dict(gate=False)


LABELS = dict(net="r2r", warm=True, credit="branch", rollouts=1, forks=4, hand_back=True, tau=0.0005,
              lr=1e-3)


@pytest.fixture
def little(monkeypatch):
    """A warm start that asks few problems, few times."""
    monkeypatch.setattr(train_policy, "N_WARM", 4)
    monkeypatch.setattr(train_policy, "N_TIMED", 1)
    monkeypatch.setattr(train_policy, "COARSE", {"call": (-2.0, 2.0), "back": (0.0,)})


OFFLINE = LABELS | dict(credit="labels", hand_back=False)


@pytest.fixture(scope="module")
def labels(tmp_path_factory, pocket):
    """Of four router-train problems of the domain."""
    folder = tmp_path_factory.mktemp("labels")
    label.make_labels(LABEL_FAST, label.pocket_problems(4), folder)
    return folder


@pytest.mark.parametrize("options, kills", [(CUT, [("last", 2)]),
                                            (CUT | dict(hand_back=True), [("best", 1), ("last", 3)]),
                                            (CUT | LABELS, [("last", 3), ("best", 2)]),
                                            (OFFLINE, [("last", 3)])])
def test_an_interrupted_policy_run_equals_an_uninterrupted_one(tmp_path, pocket, monkeypatch, little, labels,
                                                               options, kills):
    """Killed before a checkpoint is written; `last` follows its row of the log, `best` precedes it."""
    config = dataclasses.replace(FAST, **options)
    warm, task = [-1] if config.warm else [], timed(tmp_path, **(SHORT if options is not OFFLINE else {}))
    rows = read_labels(labels, None, task) if config.credit == "labels" else None
    train_policy.train(config, task, tmp_path / "whole", rows)
    timeless = lambda folder: [{k: v for k, v in row.items() if k != "seconds"}
                               for row in read_rows(folder / "log.jsonl")]  # noqa: E731
    whole, saved = timeless(tmp_path / "whole"), train_policy.save_checkpoint
    assert [row["iteration"] for row in whole] == [*warm, 0, 1, 2]
    for which, nth in kills:
        parts, calls = tmp_path / f"{which} {nth}", []

        def killed(path, *args):
            calls.append(path.stem)
            if path.stem == which and calls.count(which) == nth:
                raise KeyboardInterrupt
            saved(path, *args)

        monkeypatch.setattr(train_policy, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            train_policy.train(config, task, parts, rows)
        monkeypatch.setattr(train_policy, "save_checkpoint", saved)
        assert len(read_rows(parts / "log.jsonl")) < 4
        train_policy.train(config, task, parts, rows)
        for name in ("last.safetensors", "best.safetensors"):
            assert (tmp_path / "whole" / name).read_bytes() == (parts / name).read_bytes()
        assert timeless(parts) == whole
    untrained, trained = (train_policy.build_policies(config, task) for _ in range(2))
    assert train_policy.load_checkpoint(tmp_path / "whole" / "last.safetensors", trained) == 3
    moved = {name: not torch.equal(p, q)
             for (name, p), q in zip(trained.named_parameters(), untrained.parameters())}
    # every policy learned something
    assert all(any(moved[name] for name in moved if name.startswith(part)) for part in trained)
    with pytest.raises(ValueError,
                       match="whole holds .* other config: expected {'kappa': 0.35}, got {'kappa': 0.9}"):
        train_policy.train(dataclasses.replace(config, kappa=0.9), task, tmp_path / "whole", rows)


def test_a_warm_start_is_r2rs_net_at_the_class_weight_that_earns_most(tmp_path, pocket, monkeypatch, little):
    """Labels whose divergent tokens weigh w times as much move every logit by log w: of the two that are
    tried the bias takes the one that earns more, and no other weight moves. Nothing is learned from rewards
    where there is no iteration."""
    monkeypatch.setattr(train_policy, "COARSE", {"call": (-2.0, 4.0), "back": (0.0,)})
    task, config = timed(tmp_path, **SHORT), train_policy.Config(**LABELS, **CUT, iterations=0, dev=4)
    policies = train_policy.train(config, task, tmp_path / "run")
    weights = rstitch.weights_of(task.path("router"), "router.safetensors")
    own = {name: p.detach() for name, p in policies["call"].named_parameters()}
    assert own.keys() == weights.keys()
    assert [name for name in own if not torch.equal(own[name], weights[name])] == ["head.bias"]
    moved = (weights["head.bias"] - own["head.bias"]).item()
    earned = {}
    price = train_policy.settled_price(config, task, tmp_path / "run")
    for x in (-2.0, 4.0):
        own["head.bias"].copy_(weights["head.bias"] - x)
        earned[x] = train_policy.answer(task, task.split("dev", 4, 1),
                                        train_policy.build_router(policies, config), price)[1].mean()
    assert earned[-2.0] != earned[4.0] and moved == pytest.approx(max(earned, key=earned.get))


def test_the_second_net_learns_where_the_first_would_call_again(tmp_path, pocket):
    """On other problems, too, it would rather stay where the SLM's next token is discarded."""
    task, config = timed(tmp_path), train_policy.Config(**LABELS, prompts=16)
    policies = train_policy.build_policies(config, task)
    policies["call"].load_state_dict(rstitch.weights_of(task.path("router"), "router.safetensors"))
    train_policy.teach_back(policies, config, task)
    router = train_policy.HandingBack(train_policy.build_router(policies, config))
    solved = solve(pocket, task.split("dev", 12), router)
    kept = {(i, c.position): c.kept for i, s in enumerate(solved) for c in s["calls"]
            if c.model == rstitch.SLM}
    known = [(policies["back"](*state).item(), kept[row, t + 1]) for row, t, state in router.seen
             if (row, t + 1) in kept]
    assert len(known) > 50 and auroc([x for x, _ in known], [k for _, k in known]) > 0.8


def at_limits(policies, config, limits: dict[str, float]) -> rstitch.PolicyRouter:
    """A router of two nets that leaves above these logits, 0 unless given."""
    call, back = (float(expit(limits.get(name, 0.0))) for name in ("call", "back"))
    return rstitch.PolicyRouter(policies["call"], config.tau, threshold=call, back=policies["back"],
                                threshold_back=back)


def test_a_policy_takes_the_thresholds_that_calibration_set(tmp_path, pocket, monkeypatch, little):
    """Those that earned most; a threshold that is given, and sampling, do without them."""
    monkeypatch.setattr(train_policy, "FINE", {"call": (-1.0, 1.0), "back": (-2.0, 2.0)})
    task = timed(tmp_path, **SHORT)
    config = train_policy.Config(**LABELS, **CUT, iterations=0, dev=4, calibrate=True, calibration=5,
                                 nets=True)
    policies = train_policy.train(config, task, tmp_path / "run")
    train_policy.export(config, task, policies, tmp_path / "run", tmp_path / "out")
    made = json.loads((tmp_path / "out" / "made.json").read_text())
    best = {name: max(curve, key=lambda point: (point[1], -abs(point[0])))[0]
            for name, curve in made["earned"].items()}
    assert made["thresholds"] == {name: pytest.approx(expit(x)) for name, x in best.items()}
    price = train_policy.settled_price(config, task, tmp_path / "run")
    for name, limits in (("call", [{"call": x} for x in (-1.0, 1.0)]),
                         ("back", [{"call": best["call"], "back": x} for x in (-2.0, 2.0)])):
        routers = [at_limits(policies, config, x) for x in limits]
        assert [reward for _, reward in made["earned"][name]] == pytest.approx([
            train_policy.answer(task, task.split("calibration", 5), router, price)[1].mean()
            for router in routers])
    monkeypatch.setattr(train_policy, "solve", None)  # nothing is answered again
    train_policy.export(config, task, policies, tmp_path / "run", tmp_path / "again")
    again = json.loads((tmp_path / "again" / "made.json").read_text())
    assert again["thresholds"] == made["thresholds"] and again["earned"] == made["earned"]
    assert made["nets_ms"]["call"] > 0 and made["nets_ms"]["back"] > 0
    load = lambda **options: rstitch.PolicyRouter.load(tmp_path / "out", *pocket[:2],  # noqa: E731
                                                       **options)
    own = load()
    assert own.limit == pytest.approx(best["call"]) and own.back.limit == pytest.approx(best["back"])
    assert load(threshold=0.5).limit == 0 and load(seed=1).limit == load(seed=1).back.limit == 0


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
    config = train_policy.Config(hand_back=True, epochs=1, minibatches=minibatches, eps_low=0.6,
                                 eps_high=1.5)
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
            decisions.append(rstitch.Decisions(rows, [0] * k, state, torch.rand(k, generator=generator) < 0.5,
                                               -2 * torch.rand(k, generator=generator)))
    A, keep = torch.randn(4, 3, generator=generator), torch.tensor([True, True, False, True])

    single = []  # (policy, state, call, old log-probability, advantage) of each decision whose group was kept
    for name, decisions in (("call", router.decisions), ("back", router.back.decisions)):
        every = [(row, d, i) for d in decisions for i, row in enumerate(d.rows)]
        for row, d, i in sorted(every, key=lambda one: one[0]):  # by rows, whatever shared a call
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
            loss = loss - min(ratio * a, ratio.clamp(0.4, 2.5) * a) / len(part)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(naive.parameters(), 1.0)
        optimizer.step()
    figures = train_policy.update(policies, torch.optim.SGD(policies.parameters(), lr=0.5),
                                  train_policy.credit_of_answers(router, A, keep), config,
                                  torch.Generator().manual_seed(7))
    assert figures["decisions"] == len(single) and figures["clipped"] > 0
    for p, q in zip(policies.parameters(), naive.parameters()):
        torch.testing.assert_close(p, q)


def test_the_learning_rate_falls_linearly_to_zero(tmp_path, pocket, monkeypatch):
    """Of four iterations the last begins at a quarter of it, and a run that goes on, too."""
    rates, row = [], dict(reward=0.0, accuracy=0.0, llm_share=0.0, latency_ms=0.0)

    def iterate(policies, optimizer, config, task, todo, price, i):
        rates.append(optimizer.param_groups[0]["lr"])
        if len(rates) == 3:
            raise KeyboardInterrupt
        return row | {"iteration": i}

    monkeypatch.setattr(train_policy, "iterate", iterate)
    config = dataclasses.replace(FAST, iterations=4, lr=0.008, dev_every=4)
    with pytest.raises(KeyboardInterrupt):
        train_policy.train(config, timed(tmp_path), tmp_path / "run")
    train_policy.train(config, timed(tmp_path), tmp_path / "run")
    assert rates == pytest.approx([0.008, 0.006, 0.004, 0.004, 0.002])


def test_a_group_is_one_problem(tmp_path, pocket, monkeypatch):
    batches, answer = [], train_policy.answer
    monkeypatch.setattr(train_policy,
                        "answer", lambda task, todo, *args, **options: batches.append((todo, options))
                        or answer(task, todo, *args, **options))
    train_policy.train(dataclasses.replace(FAST, iterations=2, dev_every=2), timed(tmp_path),
                       tmp_path / "run")
    rollouts = [todo for todo, options in batches if "seed" in options]
    assert len(rollouts) == 2 and all(len(todo) == 6 for todo in rollouts)
    groups = [todo[2 * g:2 * g + 2] for todo in rollouts for g in range(3)]
    assert all(a == b for a, b in groups) and len({a for a, _ in groups}) == 6  # and no problem comes twice


@pytest.mark.parametrize("options", [{}, dict(scale="none", dynamic="off"),
                                     dict(eps=0.5, dynamic="accuracy")])
def test_an_answer_is_credited_within_its_group(tmp_path, pocket, monkeypatch, options):
    """Rewards 0, 1, 2, ... of 3 problems with 4 answers each: a group is what follows one another."""
    config, task = dataclasses.replace(FAST, rollouts=4, **options), timed(tmp_path)
    answer, seen = train_policy.answer, []

    def rewarded(*args, **options):
        solved, total, row = answer(*args, **options)
        for k, one in enumerate(solved):
            one["correct"] = k % 4 == 1 and k < 8
        return solved, np.arange(len(total), dtype=float) ** 2, row

    monkeypatch.setattr(train_policy, "answer", rewarded)
    monkeypatch.setattr(train_policy, "credit_of_answers", lambda *a: seen.append(a[1:]) or [])
    policies = train_policy.build_policies(config, task)
    optimizer = torch.optim.Adam(policies.parameters())
    train_policy.iterate(policies, optimizer, config, task, task.split("router-train", 3),
                         train_policy.Price(0.001, MODELS_MS, 128), 0)
    ((A, keep),) = seen
    R = torch.tensor([[0, 1, 4, 9], [16, 25, 36, 49], [64, 81, 100, 121]], dtype=torch.float64)
    torch.testing.assert_close(A, rstitch.group_advantages(R, config.eps, config.scale))
    # of the last group no answer is right
    assert keep.tolist() == [True, True, config.dynamic != "accuracy"]


@pytest.mark.parametrize("gate", [True, False])
def test_a_run_settles_what_its_answers_earn(tmp_path, little, gate):
    config, task = train_policy.Config(gate=gate, nets=True, kappa=0.8, dev=4), timed(tmp_path)
    price = train_policy.settled_price(config, task, tmp_path / "run")
    settled = json.loads((tmp_path / "run" / "config.json").read_text())
    *_, alone = train_policy.answer(task, task.split("dev", 4, 1), rstitch.LLMOnly(),
                                    train_policy.Price(0.0, MODELS_MS, 128))
    assert price.gate is gate and settled["llm_ms"] == pytest.approx(alone["latency_ms"])
    assert price.lam == pytest.approx(0.8 / alone["latency_ms"])
    assert price.nets_ms == settled["nets_ms"] and price.nets_ms["call"] > 0


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
        router.decisions.append(rstitch.Decisions(list(range(32)), [0] * 32, state, call,
                                                  rstitch.log_probability(logit, call)))
        right = (call.cpu() == (kind == 0)).float().view(16, 2)
        parts = train_policy.credit_of_answers(router, rstitch.group_advantages(right),
                                               train_policy.kept_groups(right, right > 0, "reward"))
        train_policy.update(policies, optimizer, parts, config, generator)
    p = policies["call"](states, torch.ones(2, device=device),
                         torch.tensor([100, 100], device=device)).sigmoid().tolist()
    assert p[0] > 0.8 and p[1] < 0.2


def test_a_batch_of_forks_is_paid_by_what_its_branches_earn(tmp_path, pocket, monkeypatch):
    """What `iterate` hands on is, fork by fork, the reward of the branch that leaves less that of the other:
    right answers less lambda times their fitted latency and the time of both nets."""
    config, task = train_policy.Config(**LABELS, prompts=3, nets=True, kappa=0.8), timed(tmp_path)
    price = train_policy.Price(0.001, MODELS_MS, 128, nets_ms={"call": 0.5, "back": 0.25})
    seen, branches, credit = [], train_policy.branches, train_policy.credit_of_forks
    asked_of = []
    monkeypatch.setattr(train_policy, "branches",
                        lambda *a: asked_of.append(a[-1]) or seen.append(branches(*a)) or seen[-1])
    monkeypatch.setattr(train_policy, "credit_of_forks", lambda *a: seen.append(a) or credit(*a))
    policies = train_policy.build_policies(config, task)
    policies["call"].load_state_dict(rstitch.weights_of(task.path("router"), "router.safetensors"))
    optimizer = torch.optim.Adam(policies.parameters(), lr=1e-3)
    train_policy.iterate(policies, optimizer, config, task, task.split("router-train", 3), price, 0)
    pairs, (_, forks, worth) = seen
    (went_on,) = asked_of
    assert went_on.seed is went_on.back.seed is None  # by likelier actions, not by draws

    def earned(answer):
        calls = answer["calls"]
        over = sum(c.model == 0 and c.entropy > 0.0005 * np.log(128) for c in calls)
        ms = rstitch.trajectory_latency(calls, *MODELS_MS) + 0.5 * over + 0.25 * sum(c.model for c in calls)
        return answer["correct"] * (1 - 0.001 * ms)

    assert len(forks) == len(pairs) == 4
    assert worth == pytest.approx([earned(leave) - earned(stay) for stay, leave in pairs])
    assert worth.any()


def test_offline_decisions_are_what_the_policy_sees_where_it_is_asked(tmp_path, pocket, labels):
    """The judged tokens above tau, each with its hidden state and its worth."""
    config, task = train_policy.Config(**OFFLINE), timed(tmp_path)
    price, known = train_policy.Price(0.001, MODELS_MS, 128), read_labels(labels, None, task)
    known.rows[0]["labels"] = "U" * len(known.rows[0]["labels"])
    use = train_policy.asked_at(config, known, 128)
    over = [[H > 0.0005 * np.log(128) for H in row["entropy"]] for row in known.rows]
    assert use.tolist() == [k + len(over[0]) for k in np.flatnonzero(np.concatenate(over[1:]))]
    start = {"reward": 0.4, "accuracy": 0.5, "llm_share": 0.3}
    data = train_policy.offline(config, task, price, known, use, start, tmp_path)
    worth = worth_of_calls(known, price, 0.8, 3)  # 0.4 / 0.5 a right answer, 1 / 0.3 tokens a call
    assert data.worth.tolist() == worth[use].tolist()
    states = torch.cat([h for row in known.rows
                        for h, _ in label.teacher_forced(pocket[0], row["prompt"], row["answer"])])
    assert torch.equal(data.tokens.batch(data.use, "cpu")[0], states[use])
    with pytest.raises(ValueError, match="--tau 1.0: no judged token"):
        train_policy.asked_at(dataclasses.replace(config, tau=1.0), known, 128)
    with pytest.raises(ValueError, match="--dev 256: no dev problem was solved"):
        train_policy.offline(config, task, price, known, use, start | {"accuracy": 0.0}, tmp_path)


class Alike:
    """Tokens of two kinds in turn, which no one has to read."""

    def __init__(self):
        self.drawn = []

    def batch(self, index, device):
        self.drawn.append(index.tolist())
        kind = torch.tensor([[1.0, 0, 0, -1], [0, 1.0, -1, 0]])[index % 2]
        return kind, torch.ones(len(index)), torch.full((len(index),), 100)


def test_credit_of_labels_teaches_where_calls_are_worth_something():
    """Two kinds of decisions, as often; a call gains at one what it loses at the other. Other decisions are
    drawn in each iteration."""
    config = train_policy.Config(net="r2r", warm=True, credit="labels", forks=16, iterations=20)
    policies = torch.nn.ModuleDict({"call": rstitch.Policy(4, 16)})
    optimizer = torch.optim.Adam(policies.parameters(), lr=1e-2)
    use = torch.arange(64)
    data = train_policy.Offline(Alike(), use, np.where(use % 2 == 0, 0.1, -0.1))
    rows = [train_policy.iterate_offline(policies, optimizer, config, data, i) for i in range(20)]
    p = policies["call"](*Alike().batch(use[:2], "cpu")).sigmoid().tolist()
    assert p[0] > 0.8 and p[1] < 0.2
    assert [row["forks"] for row in rows] == [16] * 20 and rows[0]["decisions"] == 32
    assert rows[0]["called"] == 0.5 and rows[-1]["earned"] > 0.02 > rows[0]["earned"]
    drawn = data.tokens.drawn
    assert len(set(map(tuple, drawn))) == 20 and all(len(set(one)) == 16 for one in drawn)


def test_a_step_on_labels_follows_what_the_policy_is_expected_to_earn(monkeypatch):
    """One decision that is all but made and one that is open, of equal worth: the gradient of the loss is
    that of minus the mean of p x worth over both actions, 2 p (1 - p) x worth / 4 at each logit."""
    config = train_policy.Config(net="r2r", warm=True, credit="labels", forks=2, epochs=1, minibatches=1)

    class Table(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logit = torch.nn.Parameter(torch.tensor([4.0, 0.0]))

        def forward(self, index):
            return self.logit[index]

    class Index:
        def batch(self, index, device):
            return (index,)

    policies = torch.nn.ModuleDict({"call": Table()})
    data = train_policy.Offline(Index(), torch.arange(2), np.array([0.1, 0.1]))
    train_policy.iterate_offline(policies, torch.optim.SGD(policies.parameters(), lr=1.0), config, data, 0)
    p = torch.tensor([4.0, 0.0]).sigmoid()
    moved = policies["call"].logit.detach() - torch.tensor([4.0, 0.0])
    assert moved.tolist() == pytest.approx((2 * p * (1 - p) * 0.1 / 4).tolist(), rel=1e-3)


def test_a_policy_that_labels_have_taught_is_calibrated_and_written(tmp_path, pocket, monkeypatch, little,
                                                                    labels):
    """By the command: what is learnt from is in made.json, and the second net stays as the warm start left
    it."""
    monkeypatch.setattr(train_policy, "FINE", {"call": (-1.0, 1.0), "back": (0.0,)})
    task = timed(tmp_path)
    arguments = (f"--name it --recipe labels --credit labels --labels {labels} --policies {tmp_path / 'out'} "
                 f"--checkpoints {tmp_path / 'run'} --latency {task.latency} --iterations 2 --forks 64 "
                 "--prompts 1 --dev 4 --calibration 3 --threads 1 --lr 0.01")
    monkeypatch.setattr("sys.argv", ["train_policy", *arguments.split()])
    train_policy.main()
    made = json.loads((tmp_path / "out" / "it" / "made.json").read_text())
    known = read_labels(labels, None, task)
    assert made["chances"] == {"D": [0, 0], "N": [0, 0]} and len(made["labels"]) == 16
    assert len(made["earned_by_calls"]) == 2 and [row[0] for row in made["curve"]] == [-1, 0, 1]
    assert set(made["thresholds"]) == {"call", "back"} and known.turned == {}
    first, last = (train_policy.build_policies(train_policy.Config(**made["config"]), task) for _ in range(2))
    assert train_policy.load_checkpoint(tmp_path / "run" / "it" / "last.safetensors", last) == 2
    first["call"].load_state_dict(rstitch.weights_of(task.path("router"), "router.safetensors"))
    assert not torch.equal(first["call"].head.weight, last["call"].head.weight)
    other = known._replace(turned={(0, 0): True})
    config = train_policy.Config(**made["config"])
    with pytest.raises(ValueError, match="holds a run of other labels"):
        train_policy.settled_price(config, task, tmp_path / "run" / "it", other)
    train_policy.settled_price(config, task, tmp_path / "run" / "it", known)


def test_thresholds_that_share_a_batch_earn_what_they_do_alone(tmp_path, pocket, monkeypatch):
    """Two blocks of limits; a run that was killed in the midst of writing one computes that one again."""
    task, config = timed(tmp_path, rows=4, **SHORT), train_policy.Config(tau=0.0005, hand_back=True)
    price = train_policy.Price(0.001, MODELS_MS, 128, **CUT)
    policies, todo = train_policy.build_policies(config, task), task.split("dev", 4)
    generator = torch.Generator().manual_seed(0)
    for net in policies.values():
        torch.nn.init.normal_(net.mlp[-1].weight, std=3.0, generator=generator)
    points = {"call": (-1.0, 0.0, 1.0), "back": (0.0,)}
    find = lambda path: train_policy.best_limits(policies, config, task, price, todo, points, path)  # noqa: E731
    limits, curves = find(tmp_path / "whole.jsonl")
    for x, earned in curves["call"]:
        router = at_limits(policies, config, {"call": x})
        assert earned == pytest.approx(train_policy.answer(task, todo, router, price)[1].mean())
    assert len({earned for _, earned in curves["call"]}) > 1
    rows = (tmp_path / "whole.jsonl").read_text()
    (tmp_path / "torn.jsonl").write_text(rows[:rows.index("\n") + 9])
    asked, solve_ = [], train_policy.solve
    monkeypatch.setattr(train_policy, "solve", lambda pair, chosen, *a, **k: asked.append(len(chosen))
                        or solve_(pair, chosen, *a, **k))
    assert find(tmp_path / "torn.jsonl") == (limits, curves) and asked == [8, 4, 4]
    asked.clear()
    assert find(tmp_path / "whole.jsonl") == (limits, curves) and not asked


def test_of_thresholds_that_earn_alike_the_one_nearest_to_the_nets_own_is_taken(tmp_path):
    tried = tmp_path / "tried.jsonl"
    append_row(tried, *({"net": "call", "limit": x, "reward": reward}
                        for x, reward in ((-2.0, 0.5), (-1.0, 0.5), (2.0, 0.5), (3.0, 0.4))))
    limits, _ = train_policy.best_limits({"call": None}, train_policy.Config(), Task(), None, [None],
                                         {"call": (-2.0, -1.0, 2.0, 3.0)}, tried)
    assert limits == {"call": -1.0}


def test_how_often_nets_are_asked_by_hand():
    """log 128 = 4.852: above tau 0.5 are entropies over 2.43 nats."""
    call = lambda model, H: rstitch.Call(model, 0, 1, 0, 5, H, True)  # noqa: E731
    calls = [call(0, 2.4), call(0, 2.45), call(1, 3.0), call(0, 4.0), call(1, 0.1)]
    plus = rstitch.PolicyRouter(rstitch.Policy(4), 0.5)
    both = rstitch.PolicyRouter(rstitch.Policy(4), 0.5, back=rstitch.Policy(4))
    r2r = rstitch.R2RRouter(rstitch.R2RNet(4, torch.nn.Embedding(128, 4), width=4, blocks=0).eval(), 0.5)
    assert asked(plus, calls, 128) == {"call": 2, "back": 0} and asked(both, calls, 128)["back"] == 2
    assert asked(r2r, calls, 128) == {"call": 3} and asked(rstitch.SLMOnly(), calls, 128) == {"call": 0}


def test_options_that_mean_nothing_are_refused(tmp_path, monkeypatch, capsys):
    for options, name in (("--forks 3", "--forks"), ("--calibration 9", "--calibration"),
                          ("--recipe labels --scale none", "--scale"),
                          ("--recipe labels --tau-back 0.1", "--tau-back"),
                          ("--recipe labels --iterations 0 --lr 1", "--lr"),
                          ("--recipe labels --iterations 0 --forks 9", "--forks"),
                          ("--scale none --eps 1", "--eps"), ("--router somewhere", "--router somewhere"),
                          ("--lam 0.1 --kappa 1", "--kappa"), ("--net r2r --width 8", "--width"),
                          ("--recipe labels --credit labels --rollouts 2", "--rollouts"),
                          ("--recipe labels --labels x", "--labels x"), ("--agree x", "--agree x")):
        monkeypatch.setattr("sys.argv", ["train_policy", "--name", "x", *options.split()])
        with pytest.raises(SystemExit):
            train_policy.main()
        assert f"{name} means nothing beside" in capsys.readouterr().err


def test_dynamic_sampling_by_hand():
    total = torch.tensor([[0.5, 0.6], [0.0, 0.0], [0.7, 0.7], [0.0, 0.7]])
    correct = total > 0
    assert train_policy.kept_groups(total, correct, "reward").tolist() == [True, False, False, True]
    assert train_policy.kept_groups(total, correct, "accuracy").tolist() == [False, False, False, True]
    assert train_policy.kept_groups(total, correct, "off").tolist() == [True] * 4


def test_lambda_is_given_or_follows_from_kappa():
    assert train_policy.lambda_of(train_policy.Config(kappa=0.5), 250.0) == 0.002
    assert train_policy.lambda_of(train_policy.Config(lam=0.01), 250.0) == 0.01


def test_rewards_with_and_without_the_gate():
    call = rstitch.Call(rstitch.LLM, 0, 1, 0, 5, 0.0, True)  # 4 ms
    solved = [{"calls": [call] * 25, "correct": True}, {"calls": [call] * 50, "correct": False}]
    price = train_policy.Price(0.001, MODELS_MS, 128)
    total, ms = price(solved)
    assert ms.tolist() == [100, 200] and total.tolist() == [pytest.approx(0.9), 0]
    no_gate = dataclasses.replace(price, gate=False)
    assert no_gate(solved)[0].tolist() == [pytest.approx(0.9), pytest.approx(-0.2)]
    # Nets that are asked at every token of the LLM, 0.5 ms each: 100 + 25 x 0.5 and 200 + 50 x 0.5.
    router = rstitch.PolicyRouter(rstitch.Policy(4), 0.5, back=rstitch.Policy(4))
    slow = dataclasses.replace(price, nets_ms={"call": 7.0, "back": 0.5})
    assert slow(solved, router)[1].tolist() == [112.5, 225] and slow(solved)[1].tolist() == [100, 200]


@pytest.mark.parametrize("change, message", [
    (dict(rollouts=1), "rollouts=1"), (dict(lam=-1e-3), "lam=-0.001"), (dict(kappa=-0.1), "kappa=-0.1"),
    (dict(tau=2.0), "tau=2.0"), (dict(prompts=0), "prompts=0"),
    (dict(scale="max"), "scale='max'"), (dict(dynamic="no"), "dynamic='no'"),
    (dict(calibration=0), "calibration=0"), (dict(start=1.0), "start=1.0"),
    (dict(eps_low=2.0), "eps_low=2.0"),
    (dict(eps_high=-1.0), "eps_high=-1.0"),
    (dict(lr=float("nan")), "lr=nan"), (dict(iterations=0), "iterations=0"), (dict(forks=0), "forks=0"),
    (dict(credit="group"), "credit='group': expected answer or branch"),
    (dict(net="mlp"), "net='mlp': expected policy or r2r"),
    (dict(warm=True), "warm=True with net='policy': expected r2r"),
    (dict(credit="branch", rollouts=0), "rollouts=0"),
])
def test_policy_runs_with_bad_options_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        train_policy.Config(**change)
