"""R-Stitch+ on a pair: a policy that decides at each uncertain token whether the LLM is worth its time. DAPO.

    python -m analysis.train_policy kappa0.35-seed0        a run of RUNS; several names run in turn
    python -m analysis.train_policy --name mine --kappa 0.2 --seed 7

Rows: log.jsonl of the run's folder of checkpoints; made.json beside the finished policy.
Feeds: `analysis.frontier` and `analysis.compare`.

An iteration answers `prompts` problems of the router-train split `rollouts` times each in one batch, actions
sampled, tokens greedy; rewards each answer with `rstitch.reward` of its fitted latency; and takes several
steps on the DAPO loss of all decisions of that batch. The policy that answers dev problems with the best mean
reward is kept. Everything random derives from the seed and the iteration, so a run that was killed goes on as
if nothing had happened.
"""
import argparse
import hashlib
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import rstitch
from analysis.instruments.checkpoints import CHECKPOINTS, load_checkpoint, resume, save_checkpoint
from analysis.instruments.options import add_options, given, option
from analysis.instruments.problems import content_of
from analysis.instruments.progress import progress
from analysis.instruments.provenance import provenance
from analysis.instruments.rows import append_row, read_rows
from analysis.instruments.runs import settle
from analysis.instruments.task import Task, solve
from rstitch import fingerprint
from rstitch_hf.ranks import start

FOLDER = CHECKPOINTS / "policies"


@dataclass(frozen=True)
class Config:
    """A training run. Everything but the machine's rounding follows from it."""

    kappa: float = option(0.35, "lambda x mean latency of the LLM alone; what a second costs in the reward")
    lam: float = option(0.0, "lambda of the reward, in 1/ms; 0 takes it from kappa")
    seed: int = option(0, "of initial weights, problems, actions and minibatches")
    tau: float = option(0.02, "the policy is asked where the SLM's entropy exceeds it, in [0, 1]: entropy in "
                              "nats divided by log V")
    tau_back: float = option(0.02, "the LLM hands back where its entropy does not exceed it, in [0, 1]")
    prompts: int = option(32, "problems per iteration")
    rollouts: int = option(8, "answers per problem")
    iterations: int = option(32, "batches of rollouts")
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
    dev_every: int = option(4, "iterations between two evaluations on dev")
    dev: int = option(256, "dev problems of an evaluation")

    def __post_init__(self):
        for name in ("prompts", "iterations", "epochs", "minibatches", "width", "dev_every", "dev"):
            rstitch.check_count(name, getattr(self, name))
        rstitch.check_count("rollouts", self.rollouts, least=2)
        for name in ("kappa", "lam", "lr", "eps"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a finite number, 0 or more")
        for name, choices in (("scale", ("std", "none")), ("dynamic", ("reward", "accuracy", "off"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected {' or '.join(choices)}")
        rstitch.EntropyRouter(self.tau, tau_back=self.tau_back)


# Kappa at which latency costs what it buys between the SLM alone and the LLM alone (without the gate), on the
# 256 dev problems:
# (0.992 - 0.539) / (464.7 - 47.6 ms) x 464.7 ms.
BREAK_EVEN = 0.505
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
}


def build_policies(config: Config, slm, llm) -> torch.nn.ModuleDict:
    """{"call": policy on the SLM's hidden state} and, with hand_back, {"back": policy on the LLM's}; the same
    for the same config."""
    models = {"call": slm} | ({"back": llm} if config.hand_back else {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return torch.nn.ModuleDict({name: rstitch.Policy(rstitch.hidden_size_of(model), config.width,
                                                         config.start,
                                                         config.use_entropy, config.use_context)
                                    .to(model.device) for name, model in models.items()})


def build_router(policies, config: Config, seed: int | None = None) -> rstitch.PolicyRouter:
    """Sampling with a seed, else the likelier action."""
    return rstitch.PolicyRouter(policies["call"], config.tau, config.tau_back, seed,
                                back=policies["back"] if config.hand_back else None)


def rewards(solved: list[dict], lam: float, models, gate: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(total reward, fitted latency in ms) of each answer; without the gate a wrong answer pays for its
    latency too."""
    latency = np.array([rstitch.trajectory_latency(s["calls"], *models) for s in solved])
    correct = np.array([s["correct"] for s in solved])
    if not gate:
        return correct - lam * latency, latency
    return np.array([rstitch.reward(bool(c), ms, lam).total for c, ms in zip(correct, latency)]), latency


def kept_groups(total: torch.Tensor, correct: torch.Tensor, dynamic: str) -> torch.Tensor:
    """(P,) which groups of (P, G) rewards dynamic sampling leaves."""
    if dynamic == "reward":
        return total.amin(1) < total.amax(1)
    if dynamic == "accuracy":
        return correct.any(1) & ~correct.all(1)
    return torch.ones(len(total), dtype=torch.bool)


def update(policies, optimizer, router, advantages: torch.Tensor, keep: torch.Tensor, config: Config,
           generator) -> dict:
    """Several optimizer steps on the decisions of one batch. advantages: (P, G), keep: (P,). Returns what a
    progress line shows."""
    G, parts = advantages.shape[1], []
    asked = {"call": router.decisions} | ({"back": router.back.decisions} if config.hand_back else {})
    for name, decisions in asked.items():
        if decisions:
            rows = torch.tensor([row for d in decisions for row in d.rows])
            use = keep[rows // G]
            state = [torch.cat(part)[use] for part in zip(*(d.state for d in decisions))]
            call, old = (torch.cat(part)[use] for part in zip(*((d.action, d.logp) for d in decisions)))
            parts.append((name, state, call, old.detach(), advantages.flatten()[rows][use].to(old)))
    total = sum(len(call) for _, _, call, *_ in parts)
    figures = {"decisions": total,
               "called": torch.cat([call for _, _, call, *_ in parts]).float().mean().item() if total
               else None, "clipped": None}
    if not total:
        return figures
    clipped = []
    for _ in range(config.epochs):
        order = torch.randperm(total, generator=generator)
        for step in order.chunk(config.minibatches):
            logp, old, A, start = [], [], [], 0
            for name, state, call, before, advantage in parts:
                mine = step[(step >= start) & (step < start + len(before))] - start
                start += len(before)
                logp.append(rstitch.log_probability(policies[name](*(x[mine] for x in state)), call[mine]))
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
    return figures | {"clipped": float(np.mean(clipped))}


def answer(pair, todo, router, lam: float, models, gate: bool = True,
           **options) -> tuple[list[dict], np.ndarray, dict]:
    """Solve problems; (solved, reward of each, mean figures)."""
    solved = solve(pair, todo, router, progress=False, **options)
    total, latency = rewards(solved, lam, models, gate)
    tokens = sum(s["tokens"] for s in solved)
    return solved, total, {"reward": float(total.mean()),
                           "accuracy": float(np.mean([s["correct"] for s in solved])),
                           "llm_share": sum(s["llm_tokens"] for s in solved) / tokens,
                           "tokens": tokens / len(solved), "latency_ms": float(latency.mean())}


def price(config: Config, llm_ms: float) -> float:
    """lambda in 1/ms."""
    return config.lam or config.kappa / llm_ms


def settled_price(config: Config, task: Task, folder: Path) -> float:
    """lambda, from kappa by the mean fitted latency of the LLM alone on the dev problems, which is written
    down at the first call. ValueError where the folder holds a run of another config."""
    pair, models = task.load(), task.latencies()
    world = {"slm": fingerprint(pair[0]), "llm": fingerprint(pair[1]),
             "latency": [{k: list(v) for k, v in m.coefficients.items()} for m in models],
             "problems": hashlib.sha256(content_of(task.problems)).hexdigest()[:16] if task.problems
             else "pocket", "dtype": task.dtype, "max_new_tokens": task.max_new_tokens,
             "prompting": task.prompting() or None}

    def alone() -> dict:
        chosen = task.split("dev", config.dev, 1)
        *_, figures = answer(pair, chosen, rstitch.LLMOnly(), 0.0, models, batch_size=task.rows,
                             max_new_tokens=task.max_new_tokens, settings=task)
        return {"llm_ms": figures["latency_ms"]}

    settled = settle(folder, {"config": asdict(config), **world}, "a run", first=alone)
    return price(config, settled["llm_ms"])


def iterate(policies, optimizer, config: Config, task: Task, todo: list, lam: float, i: int) -> dict:
    """Iteration i: a batch of rollouts and the steps on it; a row of the log. Fewer problems than all
    iterations take are gone through again."""
    for group in optimizer.param_groups:
        group["lr"] = config.lr * (1 - i / config.iterations)
    seed = int.from_bytes(hashlib.sha256(f"{config.seed} {i}".encode()).digest()[:6], "big")
    asked = range(i * config.prompts, (i + 1) * config.prompts)
    batch = [todo[k % len(todo)] for k in asked for _ in range(config.rollouts)]
    router = build_router(policies, config, seed)
    solved, total, row = answer(task.load(), batch, router, lam, task.latencies(), config.gate,
                                batch_size=len(batch), seed=seed,
                                max_new_tokens=task.max_new_tokens, settings=task)
    R = torch.tensor(total).view(config.prompts, config.rollouts)
    keep = kept_groups(R, torch.tensor([s["correct"] for s in solved]).view_as(R), config.dynamic)
    advantages, generator = rstitch.group_advantages(R, config.eps,
                                                     config.scale), torch.Generator().manual_seed(seed)
    return row | {"iteration": i, "groups": int(keep.sum())} | update(policies, optimizer, router, advantages,
                                                                      keep, config, generator)


def in_a_line(row: dict) -> str:
    """A row of the log, as progress shows it."""
    dev = f" | dev reward {row['dev']['reward']:.3f}" if "dev" in row else ""
    return (f"reward {row['reward']:.3f} right {100 * row['accuracy']:.0f} % LLM "
            f"{100 * row['llm_share']:.0f} % "
            f"{row['latency_ms']:.0f} ms{dev}")


def train(config: Config, task: Task, folder: Path) -> torch.nn.ModuleDict:
    """Train one policy, from its last checkpoint if there is one. The best on dev ends up in best.safetensors
    and is returned."""
    pair, lam = task.load(), settled_price(config, task, folder)
    policies = build_policies(config, *pair[:2])
    optimizer = torch.optim.Adam(policies.parameters(), lr=config.lr)
    first = resume(folder, policies, optimizer, "iteration")
    best = max((row["dev"]["reward"] for row in read_rows(folder / "log.jsonl") if "dev" in row),
               default=-float("inf"))
    todo = task.split("router-train", config.prompts * config.iterations, config.seed)
    dev = task.split("dev", config.dev, 1)
    with progress(config.iterations, folder.name, initial=first) as bar:
        for i in range(first, config.iterations):
            start = time.perf_counter()
            row = iterate(policies, optimizer, config, task, todo, lam, i)
            if (i + 1) % config.dev_every == 0 or i + 1 == config.iterations:
                *_, row["dev"] = answer(pair, dev, build_router(policies, config), lam, task.latencies(),
                                        config.gate,
                                        batch_size=task.rows, max_new_tokens=task.max_new_tokens,
                                        settings=task)
                if row["dev"]["reward"] > best:
                    best = row["dev"]["reward"]
                    save_checkpoint(folder / "best.safetensors", policies, optimizer, i + 1)
            row["seconds"] = time.perf_counter() - start
            append_row(folder / "log.jsonl", row)
            save_checkpoint(folder / "last.safetensors", policies, optimizer, i + 1)
            bar.set_postfix_str(in_a_line(row), refresh=False)
            bar.update()
    load_checkpoint(folder / "best.safetensors", policies)
    return policies


def export(config: Config, task: Task, policies, folder: Path, target: Path) -> None:
    """Write a trained policy as safetensors, and how it was made beside it."""
    log, settled = read_rows(folder / "log.jsonl"), json.loads((folder / "config.json").read_text())
    evaluated = [row for row in log if "dev" in row]
    best = max(evaluated, key=lambda row: row["dev"]["reward"])
    target.mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach().contiguous() for name, p in policies.named_parameters()},
              target / "policy.safetensors")
    made = {"config": asdict(config), "lam": price(config, settled["llm_ms"]),
            **{name: settled[name] for name in ("slm", "llm", "latency", "problems", "max_new_tokens")},
            "iteration": best["iteration"], "dev": best["dev"],
            "minutes": sum(row["seconds"] for row in log) / 60,
            "curve": [[row["iteration"], row["reward"], row["accuracy"], row["llm_share"], row["latency_ms"]]
                      for row in log],
            **provenance(config.seed, config.dev, task.device, task.dtype)}
    (target / "made.json").write_text(json.dumps(made) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="*", help=f"names of RUNS: {', '.join(RUNS)}")
    parser.add_argument("--name", help="of a run with the options below")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(),
                        help="CPU threads (default: %(default)s)")
    parser.add_argument("--checkpoints", type=Path, default=FOLDER,
                        help="folder of unfinished runs (default: %(default)s)")
    add_options(parser, Task)
    add_options(parser, Config)
    args = parser.parse_args()
    changes = given(args, Config)
    try:
        task = Task(**given(args, Task))
        rstitch.check_count("--threads", args.threads)
        unknown = [name for name in args.run if name not in RUNS]
        if unknown or bool(args.run) == bool(args.name) or args.run and changes:
            raise ValueError(f"run {unknown[0]!r} is not in RUNS" if unknown
                             else "expected names of RUNS, or --name with options, not both")
        target = task.needed("policies")
        task.load()
        torch.set_num_threads(args.threads)
        for name, config in {name: RUNS[name]
                             for name in args.run}.items() if args.run else [(args.name,
                                                                              replace(Config(), **changes))]:
            policies = train(config, task, args.checkpoints / name)
            export(config, task, policies, args.checkpoints / name, target / name)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    start(main)
