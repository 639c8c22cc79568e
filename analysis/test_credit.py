"""Branches at single decisions: each is the answer of a router that decides otherwise there alone."""
import numpy as np
import pytest
import torch

import rstitch
from analysis import train_policy
from analysis.instruments.credit import (
    Forced,
    Fork,
    branches,
    chosen_forks,
    differences,
    recounted,
)
from analysis.instruments.task import Task, solve


def policies_of_any_mind(task: Task, seed: int = 0) -> torch.nn.ModuleDict:
    """Both nets decide differently from state to state."""
    config = train_policy.Config(hand_back=True, seed=seed)
    policies, generator = train_policy.build_policies(config, task), torch.Generator().manual_seed(seed)
    for net in policies.values():
        torch.nn.init.normal_(net.mlp[-1].weight, std=3.0, generator=generator)
    return policies.requires_grad_(False)


class Otherwise:
    """A router that decides otherwise at one place of one row."""

    def __init__(self, router, fork: Fork):
        self.router, self.fork = router, fork

    def turned(self, model: int, step: rstitch.Step, leave: torch.Tensor) -> torch.Tensor:
        here = torch.tensor([model == self.fork.model and row == self.fork.row and t == self.fork.position
                             for row, t in zip(step.rows, step.position.tolist())])
        return leave ^ here

    def leave_slm(self, step: rstitch.Step) -> torch.Tensor:
        return self.turned(rstitch.SLM, step, self.router.leave_slm(step))

    def leave_llm(self, step: rstitch.Step) -> torch.Tensor:
        return self.turned(rstitch.LLM, step, self.router.leave_llm(step))


def test_a_branch_is_the_answer_that_differs_in_one_decision(pocket):
    """Every third decision of three answers, both nets': the branch of the action that was taken is the
    answer itself, the other that of a router which decides otherwise there; all forward passes alike, what
    they read included, and so their fitted latency."""
    task = Task(rows=5, max_new_tokens=60)
    policies, config = policies_of_any_mind(task), train_policy.Config(hand_back=True, tau=0.0005)
    todo = task.split("dev", 3)
    router = train_policy.build_router(policies, config)
    options = dict(max_new_tokens=60, seed=0)
    solved = solve(pocket, todo, router, **options)
    limit = 0.0005 * np.log(128)
    forks = [Fork(i, call.position, call.model, ())
             for i, s in enumerate(solved) for call in s["calls"]
             if call.model == rstitch.LLM or call.entropy > limit][::3]
    assert {fork.model for fork in forks} == {0, 1} and len(forks) > 20
    differ = 0
    for fork, pair in zip(forks, branches(task, todo, solved, forks, router)):
        calls = solved[fork.row]["calls"]
        at = next(i for i, c in enumerate(calls) if (c.position, c.model) == (fork.position, fork.model))
        left = (not calls[at].kept if fork.model == rstitch.SLM
                else at + 1 < len(calls) and calls[at + 1].model == rstitch.SLM)
        if at + 1 == len(calls) and fork.model == rstitch.LLM:
            continue  # the answer ends here: nobody sees who would go on
        other = solve(pocket, todo, Otherwise(router, fork), **options)[fork.row]
        for got, expected in ((pair[left], solved[fork.row]), (pair[not left], other)):
            assert [c[:5] + c[6:] for c in got["calls"]] == [c[:5] + c[6:] for c in expected["calls"]]
            assert (got["correct"], got["text"]) == (expected["correct"], expected["text"])
        differ += other["calls"] != solved[fork.row]["calls"]
    assert differ > 10


def test_recounting_gives_back_what_stitch_counted(pocket):
    solved = solve(pocket, Task().split("dev", 3), rstitch.EntropyRouter(0.005))
    for s in solved:
        prompt = s["calls"][0].n_inf
        bare = [call._replace(n_inf=0, n_kv=0) for call in s["calls"]]
        assert recounted(prompt, bare) == s["calls"]


def test_a_forced_router_decides_once():
    """Rows 1 and 0 of the batch, at the first token and later."""

    class Never:
        def leave_slm(self, step):
            return torch.zeros(len(step.rows), dtype=torch.bool)

        leave_llm = leave_slm

    def step(rows, positions):
        return rstitch.Step(rows, rows, *[None] * 4, torch.tensor(positions), None, None)

    forced = Forced(Never(), rstitch.SLM, [False, True])
    assert forced.leave_slm(step([1, 0], [0, 0])).tolist() == [True, False]
    assert forced.leave_slm(step([1, 0], [3, 1])).tolist() == [False, False]
    assert forced.leave_llm(step([1, 0], [0, 0])).tolist() == [False, False]
    assert Forced(Never(), rstitch.LLM, [True]).leave_llm(step([0], [0])).tolist() == [True]


def sampled(p: list[float]) -> rstitch.PolicyRouter:
    """A router with one decision of each of these probabilities, of the action that was taken."""
    router = rstitch.PolicyRouter(rstitch.Policy(4), 0.0, seed=0)
    router.decisions.append(rstitch.Decisions(list(range(len(p))), [0] * len(p), (torch.zeros(len(p), 4),),
                                              torch.ones(len(p), dtype=torch.bool), torch.tensor(p).log()))
    return router


def test_a_fork_is_the_decision_with_its_own_state():
    """Of both nets, over several calls; in the order of rows and positions, whatever shared a call."""
    router = rstitch.PolicyRouter(rstitch.Policy(4), 0.0, seed=0, back=rstitch.Policy(4))

    def decided(rows, positions, *states):
        state = torch.tensor([[float(x)] for x in states]), torch.tensor(states)
        return rstitch.Decisions(rows, positions, state, torch.tensor([True] * len(rows)),
                                 torch.full((len(rows),), 0.5).log())

    router.decisions += [decided([2, 0], [5, 1], 25, 1), decided([2, 1], [3, 7], 23, 17)]
    router.back.decisions += [decided([1], [4], 114)]
    forks = chosen_forks(router, 9, np.random.default_rng(0))
    assert [(f.row, f.position, f.model, f.net) for f in forks] == [
        (0, 1, 0, "call"), (1, 7, 0, "call"), (2, 3, 0, "call"), (2, 5, 0, "call"), (1, 4, 1, "back")]
    assert [[x.flatten().tolist() for x in f.state] for f in forks] == [
        [[1.0], [1]], [[17.0], [17]], [[23.0], [23]], [[25.0], [25]], [[114.0], [114]]]


def test_each_fork_is_paid_for_its_own_branches():
    """Forks of both nets in turn."""
    policies = torch.nn.ModuleDict({"call": rstitch.Policy(4), "back": rstitch.Policy(4)})
    state = torch.zeros(1, 4), torch.ones(1), torch.ones(1)
    forks = [Fork(0, k, k % 2, state) for k in range(4)]
    call, back = train_policy.credit_of_forks(policies, forks, np.array([1.0, 2.0, 3.0, 4.0]))
    assert (call.net, call.advantage.tolist()) == ("call", [1, 3, -1, -3])
    assert (back.net, back.advantage.tolist()) == ("back", [2, 4, -2, -4])


def test_forks_are_drawn_where_the_policy_is_undecided():
    """p (1 - p) is 0.25, 0.09, 0 and 0.25: the first of one draw is row 0 or 3 in 50 of 59 cases, row 2
    never."""
    router = sampled([0.5, 0.1, 1.0, 0.5])
    first = [chosen_forks(router, 1, np.random.default_rng(seed))[0].row for seed in range(2000)]
    counts = np.bincount(first, minlength=4) / 2000
    assert counts[2] == 0 and counts[[0, 3]] == pytest.approx([25 / 59] * 2, abs=0.04)
    assert [fork.row for fork in chosen_forks(router, 9, np.random.default_rng(0))] == [0, 1, 3]
    assert chosen_forks(sampled([1.0]), 5, np.random.default_rng(0)) == []


def test_what_leaving_is_worth_by_hand():
    pairs = [({"r": 0.0}, {"r": 0.75}), ({"r": 1.0}, {"r": 0.5})]
    assert differences(pairs, lambda answers: np.array([a["r"] for a in answers])).tolist() == [0.75, -0.5]


def test_the_better_branch_becomes_likelier():
    """Leaving is worth 0.5 in one state and costs 0.5 in the other. The old probability is 0.5 of both
    actions; r' is 0.5 for leaving, -0.5 for not, so the first gradient of the loss, a mean over 4, in a
    state's logit is -(A x 0.5 + (-A) x (-0.5)) / 4 = -A / 4."""
    policies = torch.nn.ModuleDict({"call": rstitch.Policy(4, 16)})
    states = torch.tensor([[1.0, 0, 0, -1], [0, 1.0, -1, 0]])
    forks = [Fork(i, 0, rstitch.SLM, (states[i:i + 1], torch.ones(1), torch.full((1,), 100)))
             for i in range(2)]
    part, = train_policy.credit_of_forks(policies, forks, np.array([0.5, -0.5]))
    assert part.action.tolist() == [True, True, False, False]
    assert part.advantage.tolist() == [0.5, -0.5, -0.5, 0.5]
    assert part.old.exp().tolist() == pytest.approx([0.5] * 4)
    logit = torch.zeros(4, requires_grad=True)
    loss = rstitch.dapo_loss(rstitch.log_probability(logit, part.action), part.old, part.advantage,
                             torch.ones(4, dtype=torch.bool))
    loss.backward()
    assert (logit.grad[:2] + logit.grad[2:]).tolist() == pytest.approx([-0.125, 0.125])
    optimizer = torch.optim.Adam(policies.parameters(), lr=1e-2)
    for _ in range(20):
        train_policy.update(policies, optimizer, train_policy.credit_of_forks(policies, forks,
                                                                              np.array([0.5, -0.5])),
                            train_policy.Config(minibatches=1), torch.Generator().manual_seed(0))
    p = policies["call"](states, torch.ones(2), torch.tensor([100, 100])).sigmoid().tolist()
    assert p[0] > 0.8 and p[1] < 0.2
