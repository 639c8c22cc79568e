"""What an analysis runs on, a pair of models and problems with answers, and what came of a router on it.

Every command that takes --slm, --llm and --problems takes them by `Task`: the pocket pair and its domain
unless said otherwise.
"""
import hashlib
import json
import math
import random
from collections.abc import Callable, Collection, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch

import rstitch
from analysis.instruments.options import option
from analysis.instruments.problems import Stated, content_of, question, read_problems, split_of, verify
from analysis.instruments.progress import progress, tracked
from analysis.instruments.provenance import provenance
from analysis.instruments.rows import RESULTS
from analysis.instruments.stats import bootstrap, ratio_of_means, wilson
from analysis.instruments.timing import REFERENCE, now, reference_ms, rotated
from analysis.pocket.domain import problems
from analysis.pocket.weights import MAX_NEW_TOKENS, MODELS
from rstitch import fingerprint
from rstitch_hf.loading import load_model

SEED = 0  # of the pocket domain's problems and of random switching
N_CALIBRATION = 300  # problems on which thresholds are chosen
TAUS = (0.0, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.4)  # R-Stitch's, normalised


@lru_cache(maxsize=None)
def load_models(slm: str, llm: str, device: str, dtype: str, special_may_differ: bool = False):
    """(SLM, LLM, tokenizer, EOS tokens), once per process."""
    pair = rstitch.load_pair(slm, llm, device, dtype, special_may_differ)
    if sum(p.numel() for p in pair[1].parameters()) < 1e8:
        torch.set_num_threads(1)
    return *pair, ends_of(pair)


def common_vocab(pair) -> int:
    """Logit columns that both models have."""
    return min(model.get_output_embeddings().weight.shape[0] for model in pair[:2])


def ends_of(pair) -> list[int]:
    """The tokens that end an answer of either model."""
    return sorted(set(rstitch.end_tokens(None, pair[:2])))


@contextmanager
def same_width(slm, llm):
    """Lets generate() take the SLM as the LLM's assistant where their logits are of unlike width (Qwen2.5:
    151,936 and 152,064, one tokenizer), which it takes for unlike tokenizers."""
    own = slm.config.vocab_size
    try:
        slm.config.vocab_size = llm.config.vocab_size
        yield
    finally:
        slm.config.vocab_size = own


@dataclass(frozen=True)
class Prompting:
    """How a question becomes a prompt; as `rstitch.encode` does it unless said otherwise."""

    system: str | None = option(None, "the system's message (default: the chat template's own)")
    instruction: str | None = option(None, "a line to add behind every question, such as how to mark the "
                                           "answer")
    template: tuple[tuple[str, object],
                    ...] = option((), "KEY=VALUE, an option of the chat template such as "
                                      "enable_thinking=false; may be repeated")

    def encode(self, tokenizer, *questions: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(input_ids, attention_mask)"""
        return rstitch.encode(tokenizer, *questions, system=self.system, instruction=self.instruction,
                              **dict(self.template))

    def record(self) -> dict:
        """The settings that results depend on, as JSON keeps them: all but the size of a batch, of the
        prompts what is not as by default."""
        unset = {f.name for f in fields(Prompting)} - self.prompting().keys()
        return {name: value for name, value in asdict(self).items() if name not in {"rows"}
                | unset} | self.prompting()

    def prompting(self) -> dict:
        """What of the prompts is not as by default, as JSON keeps it."""
        return json.loads(json.dumps({f.name: getattr(self, f.name) for f in fields(Prompting)
                                      if getattr(self, f.name) != f.default}))


@dataclass(frozen=True)
class Pair(Prompting):
    """Two models with one tokenizer, and how to run them."""

    slm: str = option(str(MODELS / "slm"), "small model, a Hugging Face name or path")
    llm: str = option(str(MODELS / "llm"), "large model with the same tokenizer")
    device: str = option("cpu", "torch device of all models")
    dtype: str = option("float32", "of all models")
    special_tokens_may_differ: bool = option(False,
                                             "take a pair whose tokenizers differ in special tokens only")
    max_new_tokens: int = option(MAX_NEW_TOKENS, "longest answer, in tokens")
    rows: int = option(256, "answers in one batch; may change from run to run, where memory runs out")

    def __post_init__(self):
        for name in ("max_new_tokens", "rows"):
            rstitch.check_count(f"--{name.replace('_', '-')}", getattr(self, name))

    def load(self):
        """(SLM, LLM, tokenizer, EOS tokens), once per process."""
        return load_models(self.slm, self.llm, self.device, self.dtype, self.special_tokens_may_differ)


POCKET = {"latency": RESULTS / "latency.json", "policies": MODELS / "policies", "router": MODELS / "r2r",
          "control": MODELS / "llm-short", "out": RESULTS}
BASE = "kappa0.35-seed0"  # the policy that stands for R-Stitch+ where one does


@dataclass(frozen=True)
class Task(Pair):
    """A pair, problems to try it on, its fitted latency and its trained routers."""

    problems: str = option("", 'JSONL file of rows {"question", "answer"}, graded by math-verify; "split" '
                               "may name router-train, dev, calibration or test, else it follows from the "
                               "question's hash. Or a data set of the hub, REPO:CONFIG:PART, such as "
                               "openai/gsm8k:main:test (default: the pocket domain)")
    latency: str = option("", "fitted latency of the pair, as analysis.latency writes it (default: the "
                              "pocket pair's)")
    policies: str = option("", "folder of R-Stitch+'s policies (default: the pocket pair's; another pair has "
                               "none)")
    router: str = option("", "folder of R2R's router (default: the pocket pair's; another pair has none)")
    control: str = option("", "a model as slow as the LLM to show beside it (default: the pocket pair's, "
                              "trained on short answers; another pair has none)")
    out: str = option("", "folder of the results (default: the pocket pair's)")

    @property
    def pocket(self) -> bool:
        return (self.slm, self.llm, self.problems) == (Task.slm, Task.llm, "")

    def path(self, name: str) -> Path | None:
        """What an option names, else the pocket pair's; None for another pair."""
        return Path(getattr(self, name)) if getattr(self, name) else POCKET[name] if self.pocket else None

    def needed(self, name: str) -> Path:
        if not self.path(name):
            raise ValueError(f"--{name} is missing: expected a {'file' if name == 'latency' else 'folder'} "
                             "for a pair or problems that are not the pocket's")
        return self.path(name)

    def split(self, name: str, n: int, seed: int = SEED) -> list:
        """The first n problems of a split; of a file, all if it has fewer, in its own order for seed 0; "any"
        takes them from all of its splits. ValueError where it has none."""
        if not self.problems:
            return problems(name, n, seed)
        found = [Stated(row["question"], str(row["answer"]))
                 for row in read_problems(self.problems, "question", "answer")
                 if name in ("any", split_of(row))]
        if not found:
            raise ValueError(f"--problems {self.problems} has no problem in its {name} split: expected more "
                             f'problems, rows with "split": "{name}", or all parts of a data set')
        if seed:
            random.Random(seed).shuffle(found)
        return found[:n]

    def latencies(self) -> tuple[rstitch.LatencyModel, rstitch.LatencyModel]:
        """(SLM's, LLM's). ValueError for those of another dtype."""
        return load_latency(self.needed("latency"), self.dtype)

    def policy(self) -> Path | None:
        """The policy that stands for R-Stitch+, else the first there is."""
        folder = self.path("policies")
        there = sorted(made.parent for made in folder.glob("*/made.json")) if folder else []
        return next((path for path in there if path.name == BASE), there[0] if there else None)


def net_file(task: Task, trained: str) -> Path:
    """The weights of the trained router: R2R's ("router"), or the policy that stands for R-Stitch+
    ("policies"). ValueError where the task has none."""
    if trained == "router":
        return task.needed("router") / "router.safetensors"
    return (task.policy() or task.needed("policies")) / "policy.safetensors"


def r2r_router(task: Task, threshold: float | None = None) -> rstitch.R2RRouter:
    """R2R at its own threshold, or at another one, which is no reason to warn here."""
    router = rstitch.R2RRouter.load(net_file(task, "router").parent, *task.load()[:2])
    return router if threshold is None else rstitch.R2RRouter(router.net, threshold)


def policy_router(task: Task, threshold: float | None = None) -> rstitch.PolicyRouter:
    """R-Stitch+ as it was trained, or calling the LLM above another probability."""
    return rstitch.PolicyRouter.load(net_file(task, "policies").parent, *task.load()[:2],
                                     threshold=threshold)


@lru_cache(maxsize=None)
def control_of(task: Task):
    """The model that is shown beside the LLM, once per process."""
    return load_model("--control", str(task.path("control")), task.device, task.dtype)


def load_latency(path: Path = RESULTS / "latency.json",
                 dtype: str | None = None) -> tuple[rstitch.LatencyModel, rstitch.LatencyModel]:
    """(SLM's, LLM's) of a file that `analysis.latency` wrote; ValueError where it tells of another dtype."""
    row = json.loads(Path(path).read_text())
    if dtype not in (None, row.get("dtype", dtype)):
        raise ValueError(f"--latency {path} is of {row['dtype']}: expected that of --dtype {dtype}")
    return rstitch.LatencyModel(**row["slm"]), rstitch.LatencyModel(**row["llm"])


def encode_problems(tokenizer, chosen: Sequence,
                    settings: Prompting = Prompting()) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask) of the questions as the command line would ask them."""
    return settings.encode(tokenizer, *map(question, chosen))


def graded(tokenizer, ends: Sequence[int], problem, tokens: Sequence[int]) -> dict:
    """What an answer says, whether it came to its end, and whether it is right."""
    text, finished = tokenizer.decode(tokens, skip_special_tokens=True), tokens[-1] in ends
    return {"text": text, "correct": verify(problem, text, finished), "finished": finished}


def ended(call: rstitch.Call, ends: Collection[int], limit: int) -> bool:
    """Is this the last call of an answer, for its end token or for its limit?"""
    return call.kept and (call.token in ends or call.position + 1 == limit)


def counter(bar, ends: Collection[int], limits: Sequence[int]) -> Callable[[int, rstitch.Call], None]:
    """An `on_token` of stitch that counts the answers which have ended."""
    return lambda row, call: bar.update(ended(call, ends, limits[row]))


def solve(pair, chosen: Sequence, router, batch_size: int = 256,
          seed: int | None = None, max_new_tokens: int = MAX_NEW_TOKENS, settings: Prompting = Prompting(),
          **options) -> list[dict]:
    """Answer every problem, `batch_size` of them at a time. Per problem: text, correct, finished, tokens,
    llm_tokens, entropy (mean, nats), calls. Random draws of a problem depend on (seed, its index), not on
    what shares the caches with it."""
    slm, llm, tokenizer, *_ = pair
    out, ends = [], ends_of(pair)
    ids, mask = encode_problems(tokenizer, chosen, settings)
    with progress(len(chosen), "answers", "problem", inner=True) as bar:
        result = rstitch.stitch(slm, llm, ids, router, attention_mask=mask, max_new_tokens=max_new_tokens,
                                seed=rstitch.row_seeds(seed, len(chosen)), slots=batch_size,
                                on_token=counter(bar, ends, [max_new_tokens] * len(chosen)), **options)
    for problem, calls, kept in zip(chosen, result.calls, result.kept):
        out.append({**graded(tokenizer, ends, problem, [call.token for call in kept]), "tokens": len(kept),
                    "llm_tokens": sum(call.model == rstitch.LLM for call in kept),
                    "entropy": float(np.mean([call.entropy for call in kept])), "calls": calls})
    return out


def describe(solved: list[dict]) -> dict:
    """Accuracy, LLM share, tokens and switches of one method over problems, each with a 95 % interval."""
    n = len(solved)
    column = {k: np.array([s[k] for s in solved], float)
              for k in ("correct", "tokens", "llm_tokens", "finished")}
    calls = [s["calls"] for s in solved]
    column["switches"] = np.array([rstitch.count_switches(row) for row in calls], float)
    return {
        "accuracy": column["correct"].mean(), "accuracy_95": wilson(int(column["correct"].sum()), n),
        "llm_share": ratio_of_means(column["llm_tokens"], column["tokens"]),
        "llm_share_95": bootstrap(ratio_of_means, column["llm_tokens"], column["tokens"]),
        "tokens": column["tokens"].mean(), "tokens_95": bootstrap(np.mean, column["tokens"]),
        "switches": column["switches"].mean(), "switches_95": bootstrap(np.mean, column["switches"]),
        "finished": column["finished"].mean(), "finished_95": wilson(int(column["finished"].sum()), n),
        "slm_passes": float(np.mean([sum(c.model == rstitch.SLM for c in row) for row in calls])),
        "llm_passes": float(np.mean([sum(c.model == rstitch.LLM for c in row) for row in calls])),
        "llm_catch_up_tokens": float(np.mean([sum(c.n_inf - 1 for c in row if c.model == rstitch.LLM)
                                              for row in calls])),
    }


def cut_off(row: dict) -> str:
    """Share of a row's answers that the token limit cut off, in %, as tables show it; "-" if not counted."""
    return f"{100 * (1 - row['finished']):.1f}" if "finished" in row else "-"


def where_time_goes(calls: Sequence[rstitch.Call], models) -> dict[str, float]:
    """The fitted milliseconds of an answer, in parts that add up to `trajectory_latency`: single tokens of
    either model that were kept, of the SLM that were discarded, and what a call that reads several tokens
    costs beyond a single one at its end: the prompt (a model's first call) and catching up."""
    parts = dict.fromkeys(("SLM", "LLM", "discarded", "prompt", "catch-up"), 0.0)
    for call in calls:
        single = models[call.model].decode(call.n_kv + call.n_inf - 1)
        parts[rstitch.NAMES[call.model] if call.kept else "discarded"] += single
        parts["catch-up" if call.n_kv else "prompt"] += models[call.model].call(call.n_inf,
                                                                                call.n_kv) - single
    return parts


def asked(router, calls: Sequence[rstitch.Call], vocab: int) -> dict[str, int]:
    """How often a router's nets are asked about an answer: R2R's at every token of the SLM, R-Stitch+'s above
    its tau and, where it has a second one to hand back, at every token of the LLM."""
    written = [sum(call.model == model for call in calls) for model in (rstitch.SLM, rstitch.LLM)]
    if isinstance(router, rstitch.PolicyRouter):
        over = sum(call.model == rstitch.SLM and call.entropy > router.rule.tau * math.log(vocab)
                   for call in calls)
        return {"call": over, "back": written[rstitch.LLM] if router.back is not None else 0}
    return {"call": written[rstitch.SLM] if isinstance(router, rstitch.R2RRouter) else 0}


def answer_ms(calls: Sequence[rstitch.Call], models, vocab: int, router=None,
              nets_ms: dict[str, float] | None = None) -> float:
    """Fitted latency of an answer at batch 1; with nets_ms, what a decision of each net takes, that of the
    router's nets too."""
    nets = asked(router, calls, vocab) if nets_ms else {}
    return (rstitch.trajectory_latency(calls, *models)
            + sum(nets_ms[name] * times for name, times in nets.items() if times))


N_TIMED = 5  # problems that the time of a net is taken on: some hundred decisions
TIMED_TOKENS = 64  # of an answer: a net takes as long at its beginning as at its end


def decision_ms(task: Task, routers: dict[str, object], chosen: Sequence) -> dict[str, dict[str, float]]:
    """Milliseconds that one decision of a router's nets takes at batch 1, where it is made: medians over the
    beginnings of answers to the chosen problems, routers in turn. By router, then "call" or "back". A policy
    leaves wherever it is asked, so that both nets are asked often, whatever they say."""
    slm, llm, tokenizer, _ = task.load()
    times: dict[str, dict[str, list[float]]] = {name: {} for name in routers}

    def timed(decide: Callable, into: list[float], leave: bool) -> Callable:
        def decide_timed(*args):
            start = now(slm.device)
            out = decide(*args)
            into.append(1e3 * (now(slm.device) - start))
            return torch.ones_like(out) if leave else out
        return decide_timed

    for name, router in routers.items():
        policy = isinstance(router, rstitch.PolicyRouter)
        method = "decide" if policy else "leave_slm"
        setattr(router, method, timed(getattr(router, method), times[name].setdefault("call", []), policy))
        if policy and router.back is not None:
            router.back.decide = timed(router.back.decide, times[name].setdefault("back", []), True)
    for problem in tracked(chosen, "times of nets", inner=True):
        ids, _ = encode_problems(tokenizer, [problem], task)
        for router in routers.values():
            rstitch.stitch(slm, llm, ids, router, max_new_tokens=min(TIMED_TOKENS, task.max_new_tokens),
                           seed=SEED)
    return {name: {net: float(np.median(ms)) for net, ms in by_net.items() if ms}
            for name, by_net in times.items()}


def summarise(task: Task, solved: list[dict], router=None, nets_ms: dict[str, float] | None = None) -> dict:
    """Figures of answers: fitted latency at batch 1, with nets_ms that of the router's nets too, where the
    models' goes, how often the nets were asked (means), and what became of every problem, [right, tokens,
    LLM tokens, ms]."""
    models, vocab = task.latencies(), common_vocab(task.load())
    ms = [round(answer_ms(s["calls"], models, vocab, router, nets_ms), 2) for s in solved]
    spent = [where_time_goes(s["calls"], models) for s in solved]
    return {**describe(solved), "latency_ms": float(np.mean(ms)),
            "spent_ms": {part: float(np.mean([one[part] for one in spent])) for part in spent[0]},
            "asked": float(np.mean([sum(asked(router, s["calls"], vocab).values()) for s in solved])),
            "outcomes": [[int(s["correct"]), s["tokens"], s["llm_tokens"], x] for s, x in zip(solved, ms)],
            **provenance(SEED, len(solved), task.device, task.dtype)}


def measure(task: Task, router, split: str, n: int, pair=None,
            nets_ms: dict[str, float] | None = None) -> dict:
    """One router over the first n problems of a split, greedy. `pair` takes the place of the task's."""
    solved = solve(pair or task.load(), task.split(split, n), router, batch_size=task.rows, seed=SEED,
                   max_new_tokens=task.max_new_tokens, settings=task)
    return summarise(task, solved, router, nets_ms)


def wall_clock(task: Task, routers: dict[str, object], n: int,
               others: dict[str, Callable[[torch.Tensor], object]] | None = None) -> dict:
    """Milliseconds by test problem at batch 1, of `stitch` with each router and of other ways to answer a
    prompt (1, P): problems in turn, ways interleaved, a reference step every ten problems."""
    slm, llm, tokenizer, _ = task.load()
    prompts = [encode_problems(tokenizer, [problem], task)[0] for problem in task.split("test", n)]
    longest = max(REFERENCE[1] + 1, max(ids.shape[1] for ids in prompts) + task.max_new_tokens)
    lms = [rstitch.CachedLM(model, 1, longest) for model in (slm, llm)]
    runs = {name: partial(rstitch.stitch, *lms, router=router, max_new_tokens=task.max_new_tokens, seed=SEED)
            for name, router in routers.items()} | (others or {})
    times: dict[str, list[float]] = {name: [] for name in runs}
    reference = []
    for run in runs.values():  # warm-up
        run(prompts[0])
    for i, ids in enumerate(tracked(prompts, "wall-clock")):
        if i % 10 == 0:
            reference.append(reference_ms(lms[1]))
        for name in rotated(list(runs), i):
            start = now(llm.device)
            runs[name](ids)
            times[name].append(1e3 * (now(llm.device) - start))
    for lm in lms:
        lm.close()
    return {"ms": times, "reference_ms": reference, **provenance(SEED, len(prompts), task.device, task.dtype)}


def digest_of(task: Task, *files: Path, also: str = "") -> str:
    """Changes where rows have to be computed anew: with the models, the problems, the fitted latency, the
    device, and the files of a router."""
    slm, llm, *_ = task.load()
    content = [also.encode(), *(file.read_bytes() for file in files)]
    content += [content_of(task.problems)] if task.problems else []
    content += [json.dumps([[model.coefficients for model in task.latencies()], fingerprint(slm),
                            fingerprint(llm), task.device, task.dtype, task.max_new_tokens,
                             *([task.prompting()] if task.prompting() else [])]).encode()]
    return hashlib.sha256(b"".join(content)).hexdigest()[:12]


def made_by(pair: Pair) -> dict:
    """What an answer follows from, its problem and its method apart; None is an option that is as by
    default."""
    slm, llm, *_ = pair.load()
    return {"slm": fingerprint(slm), "llm": fingerprint(llm), "dtype": pair.dtype,
            "limit": pair.max_new_tokens, **{f.name: None for f in fields(Prompting)}, **pair.prompting()}


def decoder(tokenizer) -> Callable[[list[int]], str]:
    return partial(tokenizer.decode, skip_special_tokens=True)


def branches_together(chosen: Sequence[int], prompts: Sequence[list[int]],
                      lengths: Sequence[int]) -> list[int]:
    """The chosen ones in the order in which least is read: those that go on from one prompt follow each
    other, the one that has most of the answer first. It reads the answer, the others copy it."""
    first = {tuple(prompt): k for k, prompt in reversed(list(enumerate(prompts)))}
    return sorted(chosen, key=lambda k: (first[tuple(prompts[k])], -lengths[k], k))
