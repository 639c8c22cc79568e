"""R-Stitch+ on a pair: a policy that decides at each uncertain token whether the LLM is worth its time. DAPO.

    python -m analysis.train_policy kappa0.35-seed0        a run of RUNS; several names run in turn
    python -m analysis.train_policy labels-kappa0.35-seed0
    python -m analysis.train_policy --name mine --recipe labels --kappa 0.2 --seed 7

Rows: log.jsonl of the run's folder of checkpoints; made.json beside the finished policy.
Feeds: `analysis.frontier` and `analysis.compare`.

An iteration answers `prompts` problems of the router-train split `rollouts` times each in one batch, actions
sampled, tokens greedy; rewards each answer with `rstitch.reward` of its fitted latency; and takes several
steps on the DAPO loss of all decisions of that batch. The policy that answers dev problems with the best mean
reward is kept. Everything random derives from the seed and the iteration, so a run that was killed goes on as
if nothing had happened.

That is the paper's recipe, as far as it is known. The other one, `labels-...`, joins both papers: the policy
is R2R's net, which labels have taught which tokens matter; rewards teach what they are worth in time. It is
asked at far more tokens, a second net decides when the LLM hands back, a decision's credit is what its two
branches earn, the nets' own time counts, and thresholds are set on calibration problems in the end. Where
rollouts cost too much, --credit labels takes the credit from labels that are made already.
"""
import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from scipy.special import expit

import rstitch
from analysis import label
from analysis.instruments.checkpoints import CHECKPOINTS, load_checkpoint, resume, save_checkpoint
from analysis.instruments.credit import Fork, branches, chosen_forks, decisions_of, differences
from analysis.instruments.labelled import Labels, read_labels, worth_of_calls
from analysis.instruments.options import add_options, given, option
from analysis.instruments.problems import content_of
from analysis.instruments.progress import progress, tracked
from analysis.instruments.provenance import provenance
from analysis.instruments.rows import append_row, read_rows, write_rows
from analysis.instruments.runs import settle
from analysis.instruments.task import (
    N_CALIBRATION,
    N_TIMED,
    Task,
    answer_ms,
    common_vocab,
    decision_ms,
    solve,
)
from analysis.train_r2r import Tokens, digest, features
from rstitch import fingerprint
from rstitch_hf.ranks import start

FOLDER = CHECKPOINTS / "policies"
ABOVE = tuple(np.linspace(-6, 6, 13).tolist())  # logits that are tried
COARSE = {"call": ABOVE[::2], "back": ABOVE[::3]}
FINE = {"call": ABOVE, "back": ABOVE[::3]}
N_WARM = 128  # of the dev problems, how many choose the weight of a warm start


@dataclass(frozen=True)
class Config:
    """A training run. Everything but the machine's rounding follows from it, and what its nets take, which is
    timed when it begins."""

    kappa: float = option(0.35, "lambda x mean latency of the LLM alone; what a second costs in the reward")
    lam: float = option(0.0, "lambda of the reward, in 1/ms; 0 takes it from kappa")
    seed: int = option(0, "of initial weights, problems, actions and minibatches")
    tau: float = option(0.02, "the policy is asked where the SLM's entropy exceeds it, in [0, 1]: entropy in "
                              "nats divided by log V")
    tau_back: float = option(0.02, "the LLM hands back where its entropy does not exceed it, in [0, 1]")
    prompts: int = option(32, "problems per iteration; a second net of a warm start is taught by eight times "
                              "as many")
    rollouts: int = option(8, "answers per problem")
    iterations: int = option(32, "batches of decisions to learn from: of rollouts or, with --credit labels, "
                                 "of labelled tokens")
    epochs: int = option(2, "passes over the decisions of a batch")
    minibatches: int = option(4, "optimizer steps per pass")
    lr: float = option(5e-3, "learning rate of Adam at the start; it falls linearly to zero")
    width: int = option(64, "hidden units of the policy")
    start: float = option(0.5, "probability of calling the LLM that the untrained policy gives everywhere")
    scale: str = option("std", "advantages: std (divided by the group's standard deviation + eps) or none")
    eps: float = option(0.05, "see scale; where it is small, lambda cancels in groups that are all right")
    dynamic: str = option("reward",
                          "dynamic sampling drops groups of equal reward (reward), all right or all wrong "
                          "(accuracy), or none (off)")
    eps_low: float = option(0.2, "clip of the probability ratio below 1")
    eps_high: float = option(0.28, "clip above 1; clip-higher is off where it equals eps_low")
    gate: bool = option(True, "latency counts only where the answer is right")
    use_entropy: bool = option(True, "the policy sees the entropy beside the hidden state")
    use_context: bool = option(True, "the policy sees the context length beside the hidden state")
    hand_back: bool = option(False,
                             "a second policy, on the LLM's hidden state, decides when the LLM hands back")
    net: str = option("policy", "that decides on calls: policy, a small one of two layers, or r2r, one "
                                "of the form of the pair's R2R router")
    warm: bool = option(False, "it starts from that router, which labels have taught; --net r2r")
    credit: str = option("answer", "of a decision: the advantage of its answer (answer), what its two "
                                   "branches earn, one less the other (branch), or what labels say of them "
                                   "(labels)")
    forks: int = option(256, "decisions of a batch that are taken both ways; --credit branch or labels")
    nets: bool = option(False, "the time of the nets counts as latency")
    calibrate: bool = option(False, "in the end, decision thresholds are set on calibration problems")
    calibration: int = option(N_CALIBRATION, "problems that --calibrate takes")
    dev_every: int = option(4, "iterations between two evaluations on dev")
    dev: int = option(256, "dev problems of an evaluation")

    def __post_init__(self):
        for name in ("prompts", "epochs", "minibatches", "width", "dev_every", "dev", "forks", "calibration"):
            rstitch.check_count(name, getattr(self, name))
        rstitch.check_count("rollouts", self.rollouts, least=2 if self.credit == "answer" else 1)
        rstitch.check_count("iterations", self.iterations, least=0 if self.warm else 1)
        if self.warm and self.net != "r2r":
            raise ValueError(f"warm=True with net={self.net!r}: expected r2r, whose weights there are")
        if self.credit == "labels" and not (self.warm and self.gate):
            raise ValueError(f"credit='labels' with warm={self.warm}, gate={self.gate}: expected a warm "
                             "start, whose answers tell what a right one earns, and the gate")
        for name in ("kappa", "lam", "lr", "eps"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a finite number, 0 or more")
        for name, choices in (("scale", ("std", "none")), ("dynamic", ("reward", "accuracy", "off")),
                              ("net", ("policy", "r2r")), ("credit", ("answer", "branch", "labels"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected {' or '.join(choices)}")
        if not (0 < self.start < 1 and 0 <= self.eps_low <= 1 and 0 <= self.eps_high < float("inf")):
            raise ValueError(f"start={self.start}, eps_low={self.eps_low}, eps_high={self.eps_high}: "
                             "expected a probability inside (0, 1), one in [0, 1], and a number, 0 or more")
        rstitch.EntropyRouter(self.tau, tau_back=self.tau_back)

    @property
    def from_labels(self) -> bool:
        """Is there something to be learnt from labels?"""
        return self.credit == "labels" and self.iterations > 0

    def unread(self) -> set[str]:
        """The options that this run does not look at."""
        small, labels = self.net == "policy" or self.hand_back, self.credit == "labels"
        read = (
            (self.iterations, ("rollouts", "epochs", "minibatches", "lr", "eps_low", "eps_high", "dev_every",
                               "credit", "forks", "scale", "eps", "dynamic")),
            (self.iterations and not labels or self.hand_back, ("prompts",)), (not labels, ("rollouts",)),
            (self.credit != "answer", ("forks",)),
            (self.credit == "answer", ("scale", "eps", "dynamic")), (self.scale == "std", ("eps",)),
            (small, ("width", "start", "use_entropy", "use_context")), (not self.hand_back, ("tau_back",)),
            (not self.lam, ("kappa",)), (self.calibrate, ("calibration",)))
        return {name for there, names in read if not there for name in names}


# Kappa at which latency costs what it buys between the SLM alone and the LLM alone (without the gate), on the
# 256 dev problems:
# (0.992 - 0.539) / (464.7 - 47.6 ms) x 464.7 ms.
BREAK_EVEN = 0.505
# The recipe that starts from labels; tau is the best of 0, 0.0005, 0.001 and 0.005 on dev.
LABELS = Config(tau=0.0005, net="r2r", hand_back=True, warm=True, credit="branch", nets=True,
                calibrate=True, prompts=64, rollouts=1, forks=512, iterations=9, epochs=1, minibatches=2,
                lr=2e-4, dev_every=3)
OFFLINE = replace(LABELS, credit="labels", forks=4096, minibatches=8, iterations=12)
RUNS = {
    # BASE is the first
    **{f"kappa{kappa:g}-seed{seed}": Config(kappa=kappa, seed=seed) for kappa in (0.35, 0.1, 0.8)
       for seed in (0, 1, 2)},
    **{f"{name}-{times}": Config(kappa=round(BREAK_EVEN * factor, 3), gate=gate)
       for times, factor in (("third", 1 / 3), ("even", 1.0), ("triple", 3.0))
       for name, gate in (("gate", True), ("no-gate", False))},
    "no-context": Config(use_context=False), "no-entropy": Config(use_entropy=False),
    "hidden-only": Config(use_context=False, use_entropy=False),
    "hand-back": Config(hand_back=True), "clip-symmetric": Config(eps_high=0.2),
    "advantages-none": Config(scale="none"),
    "advantages-std": Config(eps=1e-6), "dynamic-accuracy": Config(dynamic="accuracy"),
    **{f"labels-kappa{kappa:g}-seed{seed}": replace(LABELS, kappa=kappa, seed=seed)
       for kappa in (0.35, 0.1, 0.8) for seed in (0, 1, 2)},
    # Each without one part. From nothing there is further to go.
    "labels-cold": replace(LABELS, warm=False, lr=5e-3, iterations=32),
    "labels-no-rewards": replace(LABELS, iterations=0),
    "labels-offline": OFFLINE,
    **{f"labels-offline-kappa{kappa:g}": replace(OFFLINE, kappa=kappa, calibrate=False)
       for kappa in (0.1, 0.8)},
    "labels-answers": replace(LABELS, credit="answer", prompts=32, rollouts=8),
    "labels-uncalibrated": replace(LABELS, calibrate=False),
}


def r2r_sizes(config: Config, task: Task) -> dict | None:
    """Of the net that stands for the policy, where that is an R2RNet: those of the pair's R2R router."""
    if config.net != "r2r":
        return None
    made = rstitch.made_of(task.needed("router"), *task.load()[:2])["config"]
    return {name: made[name] for name in ("top_k", "width", "blocks", "dropout")}


def build_policies(config: Config, task: Task) -> torch.nn.ModuleDict:
    """{"call": policy on the SLM's hidden state} and, with hand_back, {"back": policy on the LLM's}; the same
    for the same config."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return rstitch.policy_nets(*task.load()[:2], asdict(config), r2r_sizes(config, task),
                                   config.start).eval()


def build_router(policies, config: Config, seed: int | None = None) -> rstitch.PolicyRouter:
    """Sampling with a seed, else the likelier action."""
    back = {"back": policies["back"]} if config.hand_back else {}
    return rstitch.PolicyRouter(policies["call"], config.tau, None if back else config.tau_back, seed, **back)


@dataclass(frozen=True)
class Price:
    """What an answer earns: right or wrong, less lambda times its fitted latency where it is right; without
    the gate a wrong answer pays for its latency too."""

    lam: float  # in 1/ms
    models: tuple[rstitch.LatencyModel, rstitch.LatencyModel]
    vocab: int
    gate: bool = True
    nets_ms: dict[str, float] | None = None  # of a decision of each net; None: their time does not count

    def __call__(self, solved: list[dict], router=None) -> tuple[np.ndarray, np.ndarray]:
        """(reward, latency in ms) of each answer."""
        latency = np.array([answer_ms(s["calls"], self.models, self.vocab, router, self.nets_ms)
                            for s in solved])
        correct = np.array([s["correct"] for s in solved])
        if not self.gate:
            return correct - self.lam * latency, latency
        return np.array([rstitch.reward(bool(c), ms, self.lam).total
                         for c, ms in zip(correct, latency)]), latency


def kept_groups(total: torch.Tensor, correct: torch.Tensor, dynamic: str) -> torch.Tensor:
    """(P,) which groups of (P, G) rewards dynamic sampling leaves."""
    if dynamic == "reward":
        return total.amin(1) < total.amax(1)
    if dynamic == "accuracy":
        return correct.any(1) & ~correct.all(1)
    return torch.ones(len(total), dtype=torch.bool)


class Part(NamedTuple):
    """Decisions of one net to learn from, k of them."""

    net: str
    state: list[torch.Tensor]  # (k, ...) each
    action: torch.Tensor  # (k,) bool
    old: torch.Tensor  # (k,) log p of it when it was taken
    advantage: torch.Tensor  # (k,)


def credit_of_answers(router, advantages: torch.Tensor, keep: torch.Tensor) -> list[Part]:
    """Every decision has its answer's advantage, as in the paper. advantages: (P, G), keep: (P,)."""
    G, parts = advantages.shape[1], []
    for name, d in decisions_of(router).items():
        rows = torch.tensor(d.rows)
        use = keep[rows // G]
        parts.append(Part(name, [x[use] for x in d.state], d.action[use], d.logp[use].detach(),
                          advantages.flatten()[rows][use].to(d.logp)))
    return parts


def both_ways(policies, name: str, state: Sequence[torch.Tensor], worth: np.ndarray) -> Part:
    """Both actions of decisions of a net, (n, ...) each: to leave is worth (n,) more than not to."""
    state = [torch.cat([part, part]) for part in state]
    leave = torch.arange(2 * len(worth), device=state[0].device) < len(worth)
    with torch.no_grad():
        old = rstitch.log_probability(policies[name](*state).float(), leave)
    gain = torch.from_numpy(worth).to(old)
    return Part(name, state, leave, old, torch.cat([gain, -gain]))


def credit_of_forks(policies, forks: list[Fork], worth: np.ndarray) -> list[Part]:
    """Both actions of each fork: to leave is worth (n,) more than not to."""
    parts = []
    for name in policies:
        mine = [k for k, fork in enumerate(forks) if fork.net == name]
        if mine:
            state = [torch.cat(part) for part in zip(*(forks[k].state for k in mine))]
            parts.append(both_ways(policies, name, state, worth[mine]))
    return parts


class Offline(NamedTuple):
    """What --credit labels learns from."""

    tokens: Tokens  # of the LLM's answers, what the policy's net sees of them
    use: torch.Tensor  # (n,) the judged ones of them at which it is asked
    worth: np.ndarray  # (n,) what a call of the LLM adds to the reward there

    def drawn(self, k: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
        """k of them at random, in the order of the answers, and their worth."""
        picked = np.random.default_rng(seed).choice(len(self.use), min(k, len(self.use)), replace=False)
        picked.sort()
        return self.use[picked], self.worth[picked]


def asked_at(config: Config, labels: Labels, vocab: int) -> torch.Tensor:
    """Of all labelled tokens, indices of the judged ones at which the policy is asked. ValueError for
    none."""
    H = np.concatenate([row["entropy"] for row in labels.rows]) / np.log(vocab)
    letters = np.array(list("".join(row["labels"] for row in labels.rows)))
    use = np.flatnonzero((H > config.tau) & (letters != "U"))
    if not len(use):
        raise ValueError(f"--tau {config.tau}: no judged token of the labels has an entropy above it")
    return torch.from_numpy(use)


def offline(config: Config, task: Task, price: Price, labels: Labels, use: torch.Tensor, start: dict,
            folder: Path) -> Offline:
    """use: of `asked_at`. start: figures of the warm start on dev, which tell what a right answer earns and
    how often the LLM is called."""
    if not start["accuracy"]:
        raise ValueError(f"--dev {config.dev}: no dev problem was solved, so that nothing tells what a right "
                         "answer earns; expected more of them")
    slm, llm, *_ = task.load()
    vocab = common_vocab((slm, llm))
    gap = max(1, round(1 / start["llm_share"])) if start["llm_share"] else sys.maxsize
    worth = worth_of_calls(labels, price, start["reward"] / start["accuracy"], gap)
    tokens = features(slm, vocab, labels.rows, r2r_sizes(config, task)["top_k"], folder / "features")
    return Offline(tokens, use, worth[use])


def update(policies, optimizer, parts: list[Part], config: Config, generator) -> dict:
    """Several optimizer steps on DAPO's loss of the decisions of one batch. Returns what a progress line
    shows."""
    total = sum(len(part.action) for part in parts)
    if not total:
        return {"decisions": 0, "clipped": None}
    clipped = []
    for _ in range(config.epochs):
        order = torch.randperm(total, generator=generator)
        for step in order.chunk(config.minibatches):
            logp, old, A, start = [], [], [], 0
            for name, state, action, before, advantage in parts:
                mine = step[(step >= start) & (step < start + len(before))] - start
                start += len(before)
                logit = policies[name](*(x[mine] for x in state)).float()
                logp.append(rstitch.log_probability(logit, action[mine]))
                old.append(before[mine])
                A.append(advantage[mine])
            logp, old, A = torch.cat(logp), torch.cat(old), torch.cat(A)
            loss = rstitch.dapo_loss(logp, old, A, torch.ones_like(A, dtype=torch.bool), config.eps_low,
                                     config.eps_high)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policies.parameters(), 1.0)
            optimizer.step()
            ratio = (logp.detach() - old).exp()
            clipped.append(((ratio > 1 + config.eps_high) & (A > 0)
                            | (ratio < 1 - config.eps_low) & (A < 0)).float().mean().item())
    return {"decisions": total, "clipped": float(np.mean(clipped))}


def answer(task: Task, todo, router, price: Price, **options) -> tuple[list[dict], np.ndarray, dict]:
    """Solve problems; (solved, reward of each, mean figures)."""
    solved = solve(task.load(), todo, router, batch_size=task.rows,
                   max_new_tokens=task.max_new_tokens, settings=task, **options)
    total, latency = price(solved, router)
    tokens = sum(s["tokens"] for s in solved)
    return solved, total, {"reward": float(total.mean()),
                           "accuracy": float(np.mean([s["correct"] for s in solved])),
                           "llm_share": sum(s["llm_tokens"] for s in solved) / tokens,
                           "tokens": tokens / len(solved), "latency_ms": float(latency.mean())}


class ByRow(torch.nn.Module):
    """A net whose log-odds are lower by a limit of each row's own, so that thresholds share a batch."""

    def __init__(self, net: torch.nn.Module, limits: Sequence[float]):
        super().__init__()
        self.net, self.limits = net, torch.tensor(limits)

    def sees(self, step: rstitch.Step, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        own = self.limits[[step.rows[i] for i in rows.tolist()]]
        return *self.net.sees(step, rows), own.to(step.hidden.device)

    def forward(self, *state: torch.Tensor) -> torch.Tensor:
        *seen, limit = state
        return self.net(*seen).float() - limit


def earned_at(policies, config: Config, task: Task, price: Price, chosen: Sequence,
              limits: Sequence[dict[str, float]]) -> list[float]:
    """Mean reward of the chosen problems at each of some limits, by net, all in one batch: its rows are the
    problems at the first limits, then at the second."""
    router = build_router({name: ByRow(net, [one.get(name, 0.0) for one in limits for _ in chosen])
                           for name, net in policies.items()}, config)
    _, total, _ = answer(task, [*chosen] * len(limits), router, price)
    return total.reshape(len(limits), len(chosen)).mean(1).tolist()


def best_limits(policies, config: Config, task: Task, price: Price, chosen: Sequence,
                points: dict[str, Sequence[float]], tried: Path) -> tuple[dict[str, float], dict[str, list]]:
    """The logit above which each net leaves its model that earns most on the chosen problems, one net after
    the other; and what every one that was tried earned: a row each in `tried`, not computed again."""
    known = {(row["net"], row["limit"]): row["reward"] for row in read_rows(tried)}
    limits, curves, at_once = {}, {}, max(1, 2 * task.rows // len(chosen))
    for name in policies:
        blocks = [points[name][k:k + at_once] for k in range(0, len(points[name]), at_once)]
        for block in tracked(blocks, f"limits of {name}", inner=True):
            if any((name, x) not in known for x in block):
                earned = earned_at(policies, config, task, price, chosen,
                                   [limits | {name: x} for x in block])
                known |= {(name, x): reward for x, reward in zip(block, earned)}
                append_row(tried, *({"net": name, "limit": x, "reward": known[name, x]} for x in block))
        curves[name] = [[x, known[name, x]] for x in points[name]]
        limits[name] = max(curves[name], key=lambda point: (point[1], -abs(point[0])))[0]
    return limits, curves


def lambda_of(config: Config, llm_ms: float) -> float:
    """In 1/ms."""
    return config.lam or config.kappa / llm_ms


def settled_price(config: Config, task: Task, folder: Path, labels: Labels | None = None) -> Price:
    """What answers of a run earn. lambda follows from kappa by the mean fitted latency of the LLM alone on
    the dev problems; that and the time of the nets are measured at the first call and written down.
    ValueError where the folder holds a run of another config."""
    pair, models = task.load(), task.latencies()
    taught = task.needed("router") / "router.safetensors" if config.warm else None
    world = {"slm": fingerprint(pair[0]), "llm": fingerprint(pair[1]),
             "latency": [{k: list(v) for k, v in m.coefficients.items()} for m in models],
             "problems": hashlib.sha256(content_of(task.problems)).hexdigest()[:16] if task.problems
             else "pocket", "dtype": task.dtype, "max_new_tokens": task.max_new_tokens,
             "prompting": task.prompting() or None, "r2r": r2r_sizes(config, task),
             "router": hashlib.sha256(taught.read_bytes()).hexdigest()[:16] if taught else None,
             "labels": digest([labels.rows, labels.right, sorted(labels.turned.items())]) if labels else None}
    free = Price(0.0, models, common_vocab(pair), config.gate)

    def measured() -> dict:
        *_, alone = answer(task, task.split("dev", config.dev, 1), rstitch.LLMOnly(), free)
        router = build_router(build_policies(config, task), config)
        return {"llm_ms": alone["latency_ms"],
                "nets_ms": decision_ms(task, {"it": router}, task.split("calibration", N_TIMED))["it"]
                if config.nets else None}

    known = settle(folder, {"config": asdict(config), **world}, "a run", first=measured)
    return replace(free, lam=lambda_of(config, known["llm_ms"]), nets_ms=known["nets_ms"])


class HandingBack:
    """A router that hands back after every token of the LLM, and keeps what its second net would see."""

    def __init__(self, router: rstitch.PolicyRouter):
        self.router, self.seen = router, []
        self.leave_slm = router.leave_slm

    def leave_llm(self, step: rstitch.Step) -> torch.Tensor:
        every = torch.arange(len(step.rows), device=step.token.device)
        self.seen += [(row, position, tuple(x[i:i + 1] for x in self.router.back.policy.sees(step, every)))
                      for i, (row, position) in enumerate(zip(step.rows, step.position.tolist()))]
        return torch.ones_like(step.token, dtype=torch.bool)


def teach_back(policies, config: Config, task: Task) -> None:
    """Fit the second net to stay where the first would discard the SLM's next token, so that its labels serve
    at hand-back, too: cross entropy on one batch of answers that hand back after every token."""
    router = HandingBack(build_router(policies, config))
    solved = solve(task.load(), task.split("router-train", 8 * config.prompts, config.seed), router,
                   batch_size=task.rows, max_new_tokens=task.max_new_tokens, settings=task)
    kept = {(i, call.position): call.kept for i, s in enumerate(solved) for call in s["calls"]
            if call.model == rstitch.SLM}
    known = [(state, kept[row, t + 1]) for row, t, state in router.seen if (row, t + 1) in kept]
    if not known:
        return
    state = [torch.cat(part) for part in zip(*(state for state, _ in known))]
    leave = torch.tensor([float(one) for _, one in known], device=state[0].device)
    net = policies["back"]
    # A few thousand tokens: without decay it would learn them by heart.
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=1.0)
    for _ in range(100):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(net(*state), leave)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def warm_start(policies, config: Config, task: Task, price: Price, folder: Path) -> None:
    """The first net becomes R2R's, the second learns from it where to stay. Labels of another class weight
    would have moved all logits alike: the weight that earns most on dev problems goes into the bias."""
    policies["call"].load_state_dict(rstitch.weights_of(task.needed("router"), "router.safetensors"))
    if config.hand_back:
        teach_back(policies, config, task)
    limits, _ = best_limits(policies, config, task, price, task.split("dev", min(N_WARM, config.dev), 1),
                            COARSE, folder / "warm.jsonl")
    for name, net in policies.items():
        (net.head if name == "call" else net.mlp[-1]).bias.data -= limits[name]


def seed_of(config: Config, i: int) -> int:
    """Of what is drawn in iteration i."""
    return int.from_bytes(hashlib.sha256(f"{config.seed} {i}".encode()).digest()[:6], "big")


def iterate_offline(policies, optimizer, config: Config, data: Offline, i: int) -> dict:
    """Iteration i on decisions that labels credit, drawn at random: the steps on them; a row of the log. Both
    actions count by their probabilities, which makes it the gradient of what the policy is expected to
    earn."""
    seed = seed_of(config, i)
    picked, worth = data.drawn(config.forks, seed)
    device = next(policies.parameters()).device
    part = both_ways(policies, "call", data.tokens.batch(picked, device), worth)
    p = part.old.exp()
    part = part._replace(advantage=p * part.advantage)
    called = p[:len(worth)].cpu().numpy()
    row = {"iteration": i, "forks": len(worth), "called": float(called.mean()),
           "earned": float((called * worth).mean())}
    return row | update(policies, optimizer, [part], config, torch.Generator().manual_seed(seed))


def iterate(policies, optimizer, config: Config, task: Task, todo: list, price: Price, i: int) -> dict:
    """Iteration i: a batch of rollouts and the steps on it; a row of the log. Fewer problems than all
    iterations take are gone through again."""
    seed = seed_of(config, i)
    chosen = range(i * config.prompts, (i + 1) * config.prompts)
    batch = [todo[k % len(todo)] for k in chosen for _ in range(config.rollouts)]
    router = build_router(policies, config, seed)
    solved, total, row = answer(task, batch, router, price, seed=seed)
    if config.credit == "branch":
        forks = chosen_forks(router, config.forks, np.random.default_rng(seed))
        greedy = build_router(policies, config)
        pairs = branches(task, batch, solved, forks, greedy)
        worth = differences(pairs, lambda answers: price(answers, greedy)[0])
        turned = [stay["correct"] != leave["correct"] for stay, leave in pairs]
        row |= {"forks": len(forks), "turned": float(np.mean(turned)) if turned else None}
        parts = credit_of_forks(policies, forks, worth)
    else:
        R = torch.tensor(total).view(config.prompts, config.rollouts)
        keep = kept_groups(R, torch.tensor([s["correct"] for s in solved]).view_as(R), config.dynamic)
        row["groups"] = int(keep.sum())
        parts = credit_of_answers(router, rstitch.group_advantages(R, config.eps, config.scale), keep)
    called = [d.action for d in router.decisions]
    row["called"] = torch.cat(called).float().mean().item() if called else None
    return row | {"iteration": i} | update(policies, optimizer, parts, config,
                                           torch.Generator().manual_seed(seed))


def in_a_line(row: dict) -> str:
    """A row of the log, as progress shows it."""
    dev = f" | dev reward {row['dev']['reward']:.3f}" if "dev" in row else ""
    if "earned" in row:
        return f"calls earn {row['earned']:.5f} a decision, LLM {100 * row['called']:.0f} % of them{dev}"
    return (f"reward {row['reward']:.3f} right {100 * row['accuracy']:.0f} % LLM "
            f"{100 * row['llm_share']:.0f} % "
            f"{row['latency_ms']:.0f} ms{dev}")


def train(config: Config, task: Task, folder: Path, labels: Labels | None = None) -> torch.nn.ModuleDict:
    """Train one policy, from its last checkpoint if there is one. The best on dev ends up in best.safetensors
    and is returned; a warm start counts, as iteration -1. labels: what --credit labels takes its credit
    from."""
    use = asked_at(config, labels, common_vocab(task.load())) if labels else None  # none is told early
    price, policies = settled_price(config, task, folder, labels), build_policies(config, task)
    optimizer = torch.optim.Adam(policies.parameters(), lr=config.lr)
    log, begun = folder / "log.jsonl", time.perf_counter()
    first = resume(folder, policies, optimizer, "iteration")
    todo = task.split("router-train", max(1, config.prompts * config.iterations), config.seed)
    dev = task.split("dev", config.dev, 1)

    def earned(done: int) -> dict:
        """Of the policies as they are; they are kept if nothing was better."""
        found = answer(task, dev, build_router(policies, config), price)[2]
        if found["reward"] > max((row["dev"]["reward"] for row in read_rows(log) if "dev" in row),
                                 default=-float("inf")):
            save_checkpoint(folder / "best.safetensors", policies, optimizer, done)
        return found

    if config.warm and not (folder / "last.safetensors").exists():
        write_rows(log, [])
        warm_start(policies, config, task, price, folder)
        row = {"iteration": -1, "dev": earned(0)}
        append_row(log, row | row["dev"] | {"seconds": time.perf_counter() - begun})
        save_checkpoint(folder / "last.safetensors", policies, optimizer, 0)
    data = offline(config, task, price, labels, use, read_rows(log)[0]["dev"], folder) if labels else None
    with progress(config.iterations, folder.name, initial=first) as bar:
        for i in range(first, config.iterations):
            begun = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = config.lr * (1 - i / config.iterations)
            row = (iterate_offline(policies, optimizer, config, data, i) if labels
                   else iterate(policies, optimizer, config, task, todo, price, i))
            if (i + 1) % config.dev_every == 0 or i + 1 == config.iterations:
                row["dev"] = earned(i + 1)
            row["seconds"] = time.perf_counter() - begun
            append_row(log, row)
            save_checkpoint(folder / "last.safetensors", policies, optimizer, i + 1)
            bar.set_postfix_str(in_a_line(row), refresh=False)
            bar.update()
    load_checkpoint(folder / "best.safetensors", policies)
    return policies


def export(config: Config, task: Task, policies, folder: Path, target: Path,
           labels: Labels | None = None) -> None:
    """Write a trained policy as safetensors, and how it was made beside it, with thresholds that were set on
    calibration problems if the config says so; `dev` is what it earned before."""
    log, settled = read_rows(folder / "log.jsonl"), json.loads((folder / "config.json").read_text())
    begun, calibrated = time.perf_counter(), {}
    if config.calibrate:
        limits, curves = best_limits(policies, config, task, settled_price(config, task, folder, labels),
                                     task.split("calibration", config.calibration), FINE,
                                     folder / "calibration.jsonl")
        calibrated = {"thresholds": {name: float(expit(x)) for name, x in limits.items()}, "earned": curves}
    seconds = sum(row["seconds"] for row in log) + time.perf_counter() - begun
    evaluated = [row for row in log if "dev" in row]
    best = max(evaluated, key=lambda row: row["dev"]["reward"])
    target.mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach().contiguous() for name, p in policies.named_parameters()},
              target / "policy.safetensors")
    made = {"config": asdict(config), "lam": lambda_of(config, settled["llm_ms"]),
            **{name: settled[name] for name in ("slm", "llm", "latency", "problems", "max_new_tokens", "r2r",
                                                "router", "nets_ms")},
            **calibrated, "iteration": best["iteration"], "dev": best["dev"], "minutes": seconds / 60,
            "curve": [[row.get(name) for name in ("iteration", "reward", "accuracy", "llm_share",
                                                  "latency_ms")] for row in log],
            **({"labels": settled["labels"], "chances": labels.chances(), "earned_by_calls": [
                [row["called"], row["earned"]] for row in log if "earned" in row]} if labels else {}),
            **provenance(config.seed, config.dev, task.device, task.dtype)}
    (target / "made.json").write_text(json.dumps(made) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="*", help=f"names of RUNS: {', '.join(RUNS)}")
    parser.add_argument("--name", help="of a run with the options below")
    parser.add_argument("--recipe", choices=["paper", "labels"],
                        help="what --name changes: the paper's recipe, or the one that starts from R2R's "
                             "router (default: paper)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(),
                        help="CPU threads (default: %(default)s)")
    parser.add_argument("--checkpoints", type=Path, default=FOLDER,
                        help="folder of unfinished runs (default: %(default)s)")
    parser.add_argument("--labels", type=Path,
                        help="folder that analysis.label made, for --credit labels (default: "
                             f"{label.FOLDER})")
    parser.add_argument("--agree", type=Path,
                        help="file of analysis.agree on these labels, whose judge answer tells how often a "
                             "token of each letter turns a right answer, for --credit labels (default: "
                             "divergent ones always, neutral ones never)")
    add_options(parser, Task, unread=("control", "out"))
    add_options(parser, Config)
    args = parser.parse_args()
    changes = given(args, Config)
    try:
        task = Task(**given(args, Task))
        rstitch.check_count("--threads", args.threads)
        unknown = [name for name in args.run if name not in RUNS]
        if unknown or bool(args.run) == bool(args.name) or args.run and (changes or args.recipe):
            raise ValueError(f"run {unknown[0]!r} is not in RUNS" if unknown
                             else "expected names of RUNS, or --name with options, not both")
        target = task.needed("policies")
        task.load()
        torch.set_num_threads(args.threads)
        mine = replace(LABELS if args.recipe == "labels" else Config(), **changes)
        if ignored := sorted(mine.unread() & changes.keys()):
            raise ValueError(f"--{ignored[0].replace('_', '-')} means nothing beside the other options of "
                             "this run: leave it out")
        runs = [(name, RUNS[name]) for name in args.run] or [(args.name, mine)]
        if "router" in given(args, Task) and not any(config.net == "r2r" for _, config in runs):
            raise ValueError(f"--router {task.router} means nothing beside --net policy: leave it out")
        credited = any(config.from_labels for _, config in runs)
        for name in ("labels", "agree"):
            if getattr(args, name) and not credited:
                raise ValueError(f"--{name} {getattr(args, name)} means nothing beside the other options of "
                                 "this run, which takes no credit from labels: leave it out")
        labels = read_labels(args.labels or label.FOLDER, args.agree, task) if credited else None
        for _, config in runs:
            r2r_sizes(config, task)
        for split in ("router-train", "dev", *(["calibration"] if any(c.calibrate or c.nets for _, c in runs)
                                               else [])):
            task.split(split, 1)  # one that has no problem is told now
        for name, config in runs:
            own = labels if config.from_labels else None
            policies = train(config, task, args.checkpoints / name, own)
            export(config, task, policies, args.checkpoints / name, target / name, own)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    start(main)
