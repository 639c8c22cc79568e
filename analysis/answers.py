"""Answers to the problems of a split, a row of JSON each, written as they end.

    P="--slm SMALL --llm LARGE --problems file.jsonl --out answers.jsonl"
    python -m analysis.answers $P --n 300 --methods llm tau=0.02 slm
    python -m analysis.answers $P --methods tau=0.02 --temperature 0.6 --samples 4

Rows: the file that --out names.
Feeds: what is said of real pairs.

A method is `slm`, `llm`, `random=P`, or `tau=T`, with `back=T` and `window=N` behind a comma:
`tau=0.02,back=1` makes visits of one token. `r2r` and `policy` are the trained routers of --router and
--policies at their own threshold, `r2r=T` and `policy=T` at another. A row holds the tokens, who wrote each,
its entropy, the proposals that were discarded, and whether the answer is right; `calls_of` makes the forward
passes of it again. The problem's text is not kept. Of a trained router a row says how often its nets were
asked, and one of its own, "net", how long a decision of each takes. A run that was killed goes on with the
answers that are missing.
"""
import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import rstitch
from analysis.instruments.credit import recounted
from analysis.instruments.options import add_options, given
from analysis.instruments.problems import PARTS, question
from analysis.instruments.progress import progress
from analysis.instruments.provenance import machine, provenance
from analysis.instruments.runs import Rows
from analysis.instruments.stats import share_of
from analysis.instruments.task import (
    N_TIMED,
    SEED,
    Task,
    asked,
    common_vocab,
    decision_ms,
    encode_problems,
    ended,
    ends_of,
    graded,
    made_by,
    net_file,
    policy_router,
    r2r_router,
)
from rstitch_hf.ranks import meet, start

KINDS = {"tau": ("tau", float), "back": ("tau_back", float), "window": ("window", int)}
# trained routers: whose net, and what makes one at a threshold
TRAINED = {"r2r": ("router", r2r_router), "policy": ("policies", policy_router)}


def trained(method: str) -> tuple[str, float | None] | None:
    """(name, threshold or None for its own) of a trained router; None for a method that is none. ValueError
    for a threshold that is none."""
    name, given, value = method.partition("=")
    if name not in TRAINED:
        return None
    try:
        threshold = float(value) if given else None
    except ValueError:
        threshold = -1.0
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"--methods {method}: expected {name} or {name}=T, a threshold in [0, 1]")
    return name, threshold


def router_of(method: str, task: Task):
    """The router that a method names. ValueError for what names none, or for a trained one that the task has
    no folder of."""
    if method in ("slm", "llm"):
        return rstitch.SLMOnly() if method == "slm" else rstitch.LLMOnly()
    if net := trained(method):
        name, threshold = net
        return TRAINED[name][1](task, threshold)
    try:
        options = dict(part.split("=") for part in method.split(","))
        if options.keys() == {"random"}:
            return rstitch.RandomRouter(float(options["random"]), seed=SEED)
        return rstitch.EntropyRouter(**{KINDS[name][0]: KINDS[name][1](value)
                                        for name, value in options.items()})
    except (ValueError, KeyError) as error:
        raise ValueError(f"--methods {method}: expected slm, llm, random=P, r2r[=T], policy[=T] or "
                         f"tau=T[,back=T][,window=N] ({error})") from None


def net_of(method: str, task: Task) -> str | None:
    """Tells one net from another, by weights and own thresholds; None for a method that has none."""
    if not (net := trained(method)):
        return None
    file = net_file(task, TRAINED[net[0]][0])
    made = rstitch.made_of(file.parent)
    own = [made.get("threshold"), made.get("thresholds")]
    return hashlib.sha256(file.read_bytes() + json.dumps(own).encode()).hexdigest()[:12]


def with_net(world: dict, methods: Sequence[str], task: Task) -> Callable[[tuple], dict]:
    """What rows of these methods are made with, by their keys, which begin with the method: the world, and
    the net if they have one."""
    nets = {method: net_of(method, task) for method in methods}
    return lambda key: world | {"net": nets.get(key[0])}


def row_of(calls: Sequence[rstitch.Call]) -> dict:
    """An answer's forward passes as a row keeps them: what follows from Algorithm 1 is left out."""
    kept = [call for call in calls if call.kept]
    return {"prompt": calls[0].n_inf, "tokens": [call.token for call in kept],
            "writer": "".join("SL"[call.model] for call in kept),
            "entropy": [float(f"{call.entropy:.4g}") for call in kept],
            "discarded": [[call.position, call.token, float(f"{call.entropy:.4g}")]
                          for call in calls if not call.kept]}


def calls_of(row: dict) -> list[rstitch.Call]:
    """The forward passes of an answer: each reads what its model has not read of the prompt and of the tokens
    before."""
    discarded, calls = {position: (token, H) for position, token, H in row["discarded"]}, []
    for position, (token, writer, H) in enumerate(zip(row["tokens"], row["writer"], row["entropy"])):
        if position in discarded:
            calls.append(rstitch.Call(rstitch.SLM, position, 0, 0, *discarded[position], False))
        calls.append(rstitch.Call("SL".index(writer), position, 0, 0, token, H, True))
    return recounted(row["prompt"], calls)


def milliseconds(row: dict, models: tuple[rstitch.LatencyModel, rstitch.LatencyModel],
                 nets_ms: dict[str, dict[str, float]] | None = None) -> float:
    """What a row's answer would take alone, by the fitted latency of both models and, where nets_ms has the
    row's net, what a decision of it takes."""
    own = (nets_ms or {}).get(row.get("net"), {})
    return (rstitch.trajectory_latency(calls_of(row), *models)
            + sum(own.get(name, 0.0) * times for name, times in row.get("asked", {}).items()))


def with_ratio(models: tuple[rstitch.LatencyModel, rstitch.LatencyModel],
               ratio: float) -> tuple[rstitch.LatencyModel, rstitch.LatencyModel]:
    """A projection: the models as they are, but for an LLM whose step with nothing cached takes `ratio` times
    the SLM's, and whose other times are longer by the same factor."""
    slm, llm = models
    factor = ratio * slm.decode(0) / llm.decode(0)
    return slm, rstitch.LatencyModel(*([factor * x for x in llm.coefficients[kind]]
                                       for kind in ("prefill", "decode")))


def answer(task: Task, router, todo: Sequence, seeds: Sequence[int], save: Callable[[int, dict], None],
           temperature: float = 0.0, label: str = "") -> None:
    """Call save(index into todo, row) with each answer as it ends."""
    slm, llm, tokenizer, *_ = task.load()
    ends, (ids, mask) = ends_of((slm, llm)), encode_problems(tokenizer, todo, task)
    vocab = common_vocab(task.load())
    calls: list[list[rstitch.Call]] = [[] for _ in todo]
    with progress(len(todo), label, "answer") as bar:

        def count(i: int, call: rstitch.Call) -> None:
            calls[i].append(call)
            if ended(call, ends, task.max_new_tokens):
                row = row_of(calls[i])
                verdict = graded(tokenizer, ends, todo[i], row["tokens"])
                nets = asked(router, calls[i], vocab)
                row |= {"asked": nets} if any(nets.values()) else {}
                save(i, {"correct": verdict["correct"], "finished": verdict["finished"], **row})
                bar.update()

        rstitch.stitch(slm, llm, ids, router, attention_mask=mask, max_new_tokens=task.max_new_tokens,
                       temperature=temperature, seed=list(seeds), slots=task.rows, on_token=count)


def digest(problem) -> str:
    """Stands for a problem whose text is not kept."""
    return hashlib.sha256(question(problem).encode()).hexdigest()[:12]


def run(task: Task, methods: Sequence[str], split: str, n: int, path: Path, temperature: float = 0.0,
        samples: int = 1) -> list[dict]:
    """The rows of every method, those that are missing computed and appended."""
    chosen = [problem for problem in task.split(split, n) for _ in range(samples)]
    world = made_by(task) | {"machine": machine(task.device), "split": split, "temperature": temperature}
    digests = list(map(digest, chosen))
    seeds = rstitch.row_seeds(SEED, len(chosen))

    named = ("method", "problem", "sample", "question")
    nets = list(dict.fromkeys(net[0] for net in map(trained, methods) if net))
    store = Rows(path, lambda row: tuple(row.get(name) for name in named),
                 with_net(world, [*methods, *nets], task))
    keys = {method: [(method, i // samples, i % samples, one) for i, one in enumerate(digests)]
            for method in methods}
    timed, few = [(net, None, None, None) for net in nets], task.split(split, min(n, N_TIMED))
    untimed = store.missing(timed)
    for key in untimed:
        ms = decision_ms(task, {"it": router_of(key[0], task)}, few)["it"]
        store.add(key, {"what": "net", "method": key[0], "ms": ms,
                        **provenance(SEED, len(few), task.device, task.dtype)})
    if nets:
        meet()  # no rank answers while another one takes times
    changed = bool(untimed)
    for method in methods:
        lacking = set(store.missing(keys[method]))
        todo = [i for i, key in enumerate(keys[method]) if key in lacking]

        def save(at: int, row: dict) -> None:
            key = keys[method][todo[at]]
            store.add(key, {"what": "answer", **dict(zip(named, key)), **row, "rows": task.rows,
                            **provenance(SEED, n, task.device, task.dtype)})

        if todo:
            answer(task, router_of(method, task), [chosen[i] for i in todo], [seeds[i] for i in todo], save,
                   temperature, method)
        changed = changed or bool(todo)
    have = store.settle(timed + [key for method in methods for key in keys[method]], changed)
    lost = sum(key not in have for method in methods for key in keys[method])
    if lost:
        raise ValueError(f"{path}: {lost} answers were made on another kind of machine than this one; "
                         "expected one kind, since rounding differs")
    return [have[key] for method in methods for key in keys[method]]


def show(method: str, rows: list[dict]) -> str:
    right, low, high = (100 * x for x in share_of(rows, "correct"))
    tokens = sum(len(r["tokens"]) for r in rows)
    return (f"{method:24} {right:5.1f} % right [{low:.1f}, {high:.1f}] of {len(rows)}, "
            f"{100 * sum(r['writer'].count('L') for r in rows) / tokens:5.1f} % LLM tokens, "
            f"{tokens / len(rows):.0f} tokens, "
            f"{100 * sum(not r['finished'] for r in rows) / len(rows):.1f} % cut off")


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, Task, unread=("latency", "control"))
    parser.add_argument("--methods", nargs="+", default=["llm", "tau=0.02", "slm"],
                        help="(default: llm tau=0.02 slm)")
    parser.add_argument("--split", choices=PARTS, default="test", help="(default: %(default)s)")
    parser.add_argument("--n", type=int, default=300, help="problems (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0,
                        help="of sampling; 0 is greedy (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=1,
                        help="answers to each problem (default: %(default)s)")
    args = parser.parse_args()
    try:
        task = Task(**given(args, Task))
        rstitch.Sampling(args.temperature)
        for name in ("n", "samples"):
            rstitch.check_count(f"--{name}", getattr(args, name))
        for method in args.methods:
            router_of(method, task)
        if not args.out:
            raise ValueError("--out is missing: expected a file for the rows")
        rows = run(task, args.methods, args.split, args.n, Path(args.out), args.temperature, args.samples)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for method in args.methods:
        print(show(method, [r for r in rows if r["method"] == method]))


if __name__ == "__main__":
    start(main, shared=True)
