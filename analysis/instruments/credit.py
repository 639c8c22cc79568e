"""What a decision was worth: both of its branches run on from one beginning, and their rewards compared.

An answer's reward says little about one of its hundred decisions. Here an answer is taken up at a decision,
once with either action, and both branches go on by the router as it would be used. What they share is read
once and copied. The difference of their rewards is the decision's own, with no other one's noise in it.
"""
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

import rstitch
from analysis.instruments.progress import progress
from analysis.instruments.task import Task, branches_together, counter, encode_problems, graded
from rstitch_hf.loading import left_padded


def recounted(prompt: int, calls: Sequence[rstitch.Call]) -> list[rstitch.Call]:
    """The forward passes of an answer to a prompt of so many tokens, with what each model reads in them."""
    cursor, out = [0, 0], []
    for call in calls:
        length = prompt + call.position
        out.append(call._replace(n_inf=length - cursor[call.model], n_kv=cursor[call.model]))
        cursor[call.model] = length
    return out


NETS = ("call", "back")  # that decide when the SLM and when the LLM is left


class Fork(NamedTuple):
    """A decision of an answer, to be taken both ways."""

    row: int  # whose answer
    position: int  # of its token
    model: int  # that was asked about
    state: tuple[torch.Tensor, ...]  # what the net was shown, (1, ...) each

    @property
    def net(self) -> str:
        """That was asked."""
        return NETS[self.model]


class Forced:
    """A router that takes a given action at the first decision about each row, and goes on as another one."""

    def __init__(self, router, first: int, action: Sequence[bool]):
        self.router, self.first, self.action = router, first, torch.tensor(action)

    def forced(self, model: int, step: rstitch.Step, leave: torch.Tensor) -> torch.Tensor:
        given = self.action[step.rows].to(leave.device)
        return torch.where((step.position == 0) & (self.first == model), given, leave)

    def leave_slm(self, step: rstitch.Step) -> torch.Tensor:
        return self.forced(rstitch.SLM, step, self.router.leave_slm(step))

    def leave_llm(self, step: rstitch.Step) -> torch.Tensor:
        return self.forced(rstitch.LLM, step, self.router.leave_llm(step))


def decisions_of(router: rstitch.PolicyRouter) -> dict[str, rstitch.Decisions]:
    """What a sampling router's nets have decided, of each that was asked."""
    found = {"call": router.decisions, "back": router.back.decisions if router.back else []}
    return {net: gathered(decisions) for net, decisions in found.items() if decisions}


def gathered(decisions: Sequence[rstitch.Decisions]) -> rstitch.Decisions:
    """All decisions of a net in one, by row and position: whatever shared a call."""
    rows, positions = [row for d in decisions for row in d.rows], [t for d in decisions for t in d.position]
    order = sorted(range(len(rows)), key=lambda k: (rows[k], positions[k]))
    state = tuple(torch.cat(part)[order] for part in zip(*(d.state for d in decisions)))
    action, logp = (torch.cat(part)[order] for part in zip(*((d.action, d.logp) for d in decisions)))
    return rstitch.Decisions([rows[k] for k in order], [positions[k] for k in order], state, action, logp)


def chosen_forks(router: rstitch.PolicyRouter, n: int, rng: np.random.Generator) -> list[Fork]:
    """At most n of the decisions that a sampling router has taken, drawn in proportion to p (1 - p): the
    undecided ones. With both actions learnt from, that is about the direction of the policy gradient, either
    action being worth what the router earns that goes on with likelier actions. Where n is no small part of
    the decisions, none being drawn twice, it leans towards the decided ones."""
    forks, p = [], []
    for net, d in decisions_of(router).items():
        forks += [Fork(row, d.position[k], NETS.index(net), tuple(x[k:k + 1] for x in d.state))
                  for k, row in enumerate(d.rows)]
        p += d.logp.exp().tolist()
    weight = np.multiply(p, np.subtract(1, p))
    n = min(n, np.count_nonzero(weight))
    picked = rng.choice(len(forks), n, replace=False, p=weight / weight.sum()) if n else []
    return [forks[k] for k in sorted(picked)]


def branches(task: Task, todo: Sequence, solved: Sequence[dict], forks: Sequence[Fork],
             router) -> list[tuple[dict, dict]]:
    """Of each fork the whole answer where the model asked about goes on, and where it is left, graded: what
    rewards need of it. todo, solved: the problems and answers that `Fork.row` counts."""
    slm, llm, tokenizer, ends = task.load()
    prompts = rstitch.unpadded(*encode_problems(tokenizer, todo, task))
    kept = [[call.token for call in solved[fork.row]["calls"] if call.kept] for fork in forks]
    out: dict[tuple[int, bool], dict] = {}
    for model in (rstitch.SLM, rstitch.LLM):
        mine = [k for k, fork in enumerate(forks) if fork.model == model]
        order = [k for k in branches_together(mine, [prompts[fork.row] for fork in forks],
                                              [fork.position for fork in forks]) for _ in range(2)]
        if not order:
            continue
        leave = [i % 2 == 1 for i in range(len(order))]
        ids, mask = left_padded([prompts[forks[k].row] + kept[k][:forks[k].position] for k in order])
        room = [task.max_new_tokens - forks[k].position for k in order]
        with progress(len(order), "branches", inner=True) as bar:
            stitched = rstitch.stitch(slm, llm, ids, Forced(router, model, leave), attention_mask=mask,
                                      max_new_tokens=room, seed=0, slots=task.rows,
                                      on_token=counter(bar, ends, room))
        for k, left, calls in zip(order, leave, stitched.calls):
            fork = forks[k]
            calls = joined(len(prompts[fork.row]), solved[fork.row]["calls"], fork, calls)
            tokens = [call.token for call in calls if call.kept]
            out[k, left] = {**graded(tokenizer, ends, todo[fork.row], tokens), "calls": calls}
    return [(out[k, False], out[k, True]) for k in range(len(forks))]


def joined(prompt: int, before: Sequence[rstitch.Call], fork: Fork,
           after: Sequence[rstitch.Call]) -> list[rstitch.Call]:
    """The passes of an answer up to a fork and those of a branch from there, as of one answer."""
    at = next(i for i, call in enumerate(before)
              if (call.position, call.model) == (fork.position, fork.model))
    return recounted(prompt, [*before[:at], *(call._replace(position=call.position + fork.position)
                                              for call in after)])


def differences(pairs: Sequence[tuple[dict, dict]],
                rewards: Callable[[list[dict]], np.ndarray]) -> np.ndarray:
    """(n,) reward of leaving the model that was asked about, less that of not."""
    stay, leave = (rewards([pair[left] for pair in pairs]) for left in (0, 1))
    return leave - stay
