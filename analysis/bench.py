"""Speed: the loop, ways to attend to a cache, the cost of a step, schedules, and whole pairs at real shapes.

    python -m analysis.bench                 pocket pair: the LLM alone against generate(), batch 1 and 32
    python -m analysis.bench --slots 16      pocket pair: 16 rows in the caches, refilled, against batches
    python -m analysis.bench --branches      pocket pair: what it costs to go on from inside of answers
    python -m analysis.bench --attention     one read of a cache at real shapes, by kernel
    python -m analysis.bench --steps         pocket LLM: time per token against context and batch, fitted
    python -m analysis.bench --schedule      simulated: who runs next, by rule, cost ratio and batch
    python -m analysis.bench --shapes 1.5B+7B --device cuda --dtype bfloat16 --batch 1 4 16 --context 1024

Rows: bench.jsonl; --schedule prints only.
Feeds: the results page's section on speed, and steps.png.

--attention and --shapes skip cells that are there. What is compared runs interleaved, in one process. The
first round is warm-up. The device is synchronised before every clock. Figures are medians with quartiles.
Ratios are taken within a round, so that other work on the machine hits both sides.

--shapes builds Qwen2.5 shapes with random weights on the device; nothing is downloaded. Who writes is
replayed from a script (share of the LLM, mean length of its visits), and the clock starts when both models
have read the prompt. In one run: either model alone, stitched, generate() of either (dynamic and static
cache), assisted generation (batch 1; a worst case, since random models agree on nothing). The ceiling is an
event simulation of the same script under the same schedule with steps timed alone. The floor of a step is the
larger of two: the bytes it must read, weights without an untied input embedding and live cache, over the
bandwidth of a read-only stream, and its operations over the best rate of a product; both of the same run.
Shapes of "mini" size run on a CPU.
"""
import argparse
import gc
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

import rstitch
from analysis.instruments.progress import tracked
from analysis.instruments.provenance import machine, provenance
from analysis.instruments.rows import RESULTS, append_row, newest
from analysis.instruments.shapes import SHAPES, build, bytes_of, measure_limits, products
from analysis.instruments.stats import bootstrap, signed, with_interval
from analysis.instruments.task import encode_problems, same_width
from analysis.instruments.timing import interleaved, now, rotated
from analysis.pocket.domain import problems
from analysis.pocket.weights import MAX_NEW_TOKENS, load_pocket
from rstitch_hf import serving
from rstitch_hf.command import usable_device
from rstitch_hf.loading import left_padded
from rstitch_hf.ranks import start

FILE = RESULTS / "bench.jsonl"


def spread(values: Sequence[float]) -> list[float]:
    """Median and quartiles."""
    return np.percentile(values, [50, 25, 75]).tolist()


def in_words(x: Sequence[float], unit: str = "", digits: int = 2) -> str:
    return "{:.{d}f}{u} ({:.{d}f}, {:.{d}f})".format(*x, u=unit, d=digits)


def where(device: str) -> dict:
    """What times hang on beside the code."""
    return {"threads": torch.get_num_threads(), "machine": machine(device), "torch": torch.__version__}


def made(seed: int, rounds: int, device: str = "cpu", dtype: str = "float32") -> dict:
    return where(device) | provenance(seed, rounds, device, dtype)


def known(rounds: int, device: str, dtype: str, **wanted) -> dict | None:
    """The last row that was timed on this kind of machine, with these threads and this torch."""
    return newest(FILE, **wanted, n=rounds, dtype=dtype, **where(device))


# ---- the loop against generate() --------------------------------------------------------------------------


def against_generate(pair, batch_size: int, new_tokens: int, rounds: int, seed: int = 0) -> dict:
    """tokens/s of `generate()` and of `stitch(LLMOnly)`, which also records entropies and calls, and their
    ratio; the same prompts, as many tokens, greedy."""
    slm, llm, tokenizer = pair
    speed: dict[str, list[float]] = {"generate": [], "stitch": []}
    for i in range(rounds + 1):
        ids, mask = encode_problems(tokenizer, problems("dev", batch_size, seed=1000 * seed + i))
        options = dict(attention_mask=mask, max_new_tokens=new_tokens, pad_token_id=tokenizer.pad_token_id)
        runs = {"generate": lambda: llm.generate(ids, do_sample=False, min_new_tokens=new_tokens, **options),
                # noqa: B023
                "stitch": lambda: rstitch.stitch(slm, llm, ids, rstitch.LLMOnly(), eos_token_id=-1,
                                                 **options)}  # noqa: B023
        for name in rotated(list(runs), i):
            start = now()
            runs[name]()
            if i:
                speed[name].append(batch_size * new_tokens / (now() - start))
    ratio = spread(np.array(speed["stitch"]) / np.array(speed["generate"]))
    return {"what": "stitch(LLMOnly) against generate()", "batch_size": batch_size, "new_tokens": new_tokens,
            "generate_tokens_per_s": float(np.median(speed["generate"])),
            "stitch_tokens_per_s": float(np.median(speed["stitch"])),
            "ratio": ratio[0], "ratio_quartiles": ratio[1:], **made(seed, rounds)}


def bench_loop(new_tokens: int, rounds: int) -> None:
    pair, rows = load_pocket(), []
    for batch_size in (1, 32):
        rows.append(against_generate(pair, batch_size, new_tokens, rounds))
        append_row(FILE, rows[-1])
        r = rows[-1]
        print(f"batch {batch_size:>2}: generate {r['generate_tokens_per_s']:.0f} tokens/s, stitch "
              f"{r['stitch_tokens_per_s']:.0f} tokens/s, "
              f"ratio {in_words([r['ratio'], *r['ratio_quartiles']])}, higher is better", flush=True)
    print(f"batch 32 over batch 1: {rows[1]['stitch_tokens_per_s'] / rows[0]['stitch_tokens_per_s']:.1f} x")


# ---- slots and shared beginnings --------------------------------------------------------------------------


def slots_row(pair, n: int, slots: int, rounds: int, tau: float = 0.005, seed: int = 0) -> dict:
    """tokens/s of R-Stitch over n problems with `slots` rows in the caches, a finished one's slot going to
    the next problem, and of batches of as many rows, each as slow as its slowest; and their ratio."""
    slm, llm, tokenizer = pair
    chosen, router = problems("dev", n, seed), rstitch.EntropyRouter(tau)
    ids, mask = encode_problems(tokenizer, chosen)
    written: list[int] = []

    def refilled() -> None:
        result = rstitch.stitch(slm, llm, ids, router, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS,
                                slots=slots)
        written[:] = [int((result.source >= 0).sum())]

    def batches() -> None:
        for at in range(0, n, slots):
            part = slice(at, at + slots)
            rstitch.stitch(slm, llm, ids[part], router, attention_mask=mask[part],
                           max_new_tokens=MAX_NEW_TOKENS)

    ms = interleaved({"slots": refilled, "batches": batches}, rounds)
    speed = {name: spread(1e3 * written[0] / np.array(times)) for name, times in ms.items()}
    return {"what": "slots against batches", "slots": slots, "tau": tau, "problems": n, "tokens": written[0],
            "tokens_per_s": speed,
            "ratio": spread(np.array(ms["batches"]) / np.array(ms["slots"])),
            **made(seed, rounds)}


def bench_slots(slots: int, n: int, rounds: int) -> None:
    row = slots_row(load_pocket(), n, slots, rounds)
    append_row(FILE, row)
    print(f"{n} problems, R-Stitch at tau {row['tau']:g}: {slots} slots "
          f"{in_words(row['tokens_per_s']['slots'], digits=0)} tokens/s, batches of {slots} "
          f"{in_words(row['tokens_per_s']['batches'], digits=0)}, ratio {in_words(row['ratio'])}, higher is "
          "better")


def branches_row(pair, lengths: Sequence[int], every: int, more: int, rounds: int, seed: int = 0) -> dict:
    """Tokens that the LLM reads, and milliseconds, to go on for `more` tokens from every `every`-th token of
    an answer, by its length: all branches in one call of `stitch`, and each one reading its whole beginning
    anew."""
    slm, llm, tokenizer = pair
    prompt = rstitch.unpadded(*encode_problems(tokenizer, problems("dev", 1, seed)))[0]
    answer = rstitch.stitch(slm, llm, torch.tensor([prompt]), rstitch.LLMOnly(), max_new_tokens=max(lengths),
                            eos_token_id=[]).sequences[0].tolist()[len(prompt):]
    out = {"what": "branches", "lengths": list(lengths), "every": every, "more": more,
           "read": {"shared": [], "alone": []}, "ms": {"shared": [], "alone": []}}
    for length in lengths:
        ids, mask = left_padded([prompt + answer[:t] for t in range(length, 0, -every)])
        options = dict(attention_mask=mask, max_new_tokens=more, eos_token_id=[], slots=16)
        read: dict[str, int] = {}

        def together() -> None:
            read["shared"] = rstitch.stitch(slm, llm, ids, rstitch.LLMOnly(),
                                            **options).n_read[1]  # noqa: B023

        def apart() -> None:
            share = rstitch.SHARED
            try:
                rstitch.SHARED = 10**9  # no beginning is that long
                read["alone"] = rstitch.stitch(slm, llm, ids, rstitch.LLMOnly(),
                                               **options).n_read[1]  # noqa: B023
            finally:
                rstitch.SHARED = share

        for name, times in interleaved({"shared": together, "alone": apart}, rounds).items():
            out["ms"][name].append(spread(times))
            out["read"][name].append(read[name])
    for what in ("read", "ms"):  # of cost = length ^ exponent
        costs = {name: [x[0] if what == "ms" else x for x in of] for name, of in out[what].items()}
        out[f"exponent of {what}"] = {name: float(np.polyfit(np.log(lengths), np.log(cost), 1)[0])
                                      for name, cost in costs.items()}
    return out | made(seed, rounds)


def bench_branches(rounds: int) -> None:
    row = branches_row(load_pocket(), (100, 200, 400, 800), 5, 20, rounds)
    append_row(FILE, row)
    print(f"{'answer, tokens':>14} {'read, shared':>13} {'read, alone':>12} {'ms, shared':>11} "
          f"{'ms, alone':>10}   (lower is better)")
    for i, length in enumerate(row["lengths"]):
        print(f"{length:>14} {row['read']['shared'][i]:>13} {row['read']['alone'][i]:>12} "
              f"{row['ms']['shared'][i][0]:>11.0f} {row['ms']['alone'][i][0]:>10.0f}")
    for what in ("read", "ms"):
        print(f"exponent of {what} in the length: shared {row[f'exponent of {what}']['shared']:.2f}, alone "
              f"{row[f'exponent of {what}']['alone']:.2f}")


# ---- attention --------------------------------------------------------------------------------------------


def copied(q, k, v, mask, scale):
    """What sdpa of transformers does where it is given a mask (since 5.23 from two tokens on)."""
    shared = q.shape[1] // k.shape[1]
    return scaled_dot_product_attention(q, k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1),
                                        attn_mask=mask, scale=scale)


def enable_gqa(q, k, v, mask, scale):
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


def folded(q, k, v, mask, scale):
    """The one that rstitch keeps."""
    return serving.grouped_attention(None, q, k, v, mask, scale)[0].transpose(1, 2)


def folded_matmul(q, k, v, mask, scale):
    n, H, S, D = q.shape
    shared = H // k.shape[1]
    scores = (q.reshape(n, -1, shared * S,
                        D) * scale) @ k.transpose(2, 3) + (mask if S == 1 else mask.repeat(1, 1, shared, 1))
    return (scores.float().softmax(-1).to(v.dtype) @ v).reshape(n, H, S, D)


KERNELS = {"sdpa, keys copied": copied, "sdpa, enable_gqa": enable_gqa, "sdpa, folded": folded,
           "matmul, folded": folded_matmul}
HEADS = {"1.5B": (12, 2, 128), "7B": (28, 4, 128), "32B": (40, 8, 128)}


def flex(mask_length: int):
    """flex_attention, compiled, every key but the last few of the cache being live; GPU only."""
    from torch.nn.attention.flex_attention import flex_attention
    torch._dynamo.reset()  # or after eight shapes it runs eagerly
    compiled = torch.compile(flex_attention, dynamic=False)

    def live(score, b, h, i, j):
        return torch.where(j < mask_length, score, -torch.inf)

    return lambda q, k, v, mask, scale: compiled(q, k, v, score_mod=live, scale=scale, enable_gqa=True)


def in_turn(runs: Sequence[Callable[[], object]]) -> Callable[[], None]:
    def all_of_them():
        for run in runs:
            run()
    return all_of_them


def replayed(runs: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """All runs as one CUDA graph: what the kernels take, without their launches."""
    once, stream, graph = in_turn(runs), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        once()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        once()
    return graph.replay


@torch.inference_mode()
def attention_row(shape: str, batch: int, context: int, S: int, device: str, dtype: str, rounds: int) -> dict:
    """One read of S tokens over caches of `context` tokens in one layer, by every kernel: milliseconds, and
    the largest difference from the first. As in a model, layer follows layer, twenty of them (on a GPU
    replayed as one graph), each with keys of its own as long as all fit 256 MB."""
    (H, K, D), kind, cuda = HEADS[shape], getattr(torch, dtype), torch.device(device).type == "cuda"
    generator = torch.Generator(device).manual_seed(0)
    layers = max(1, min(20, (256 << 20) // (2 * batch * K * context * D * kind.itemsize)))
    q, *caches = (torch.randn(batch, heads, n, D, generator=generator, device=device, dtype=kind)
                  for heads, n in ((H, S), *[(K, context)] * (2 * layers)))
    mask = torch.zeros(batch, 1, S, context, device=device, dtype=kind)
    mask[..., context - 3:] = torch.finfo(kind).min
    kernels = KERNELS | ({"flex_attention": flex(context - 3)} if cuda else {})
    over = lambda kernel, i=0: lambda: kernel(q, *caches[2 * i:2 * i + 2], mask, D**-0.5)  # noqa: E731
    expected = copied(q, *caches[:2], mask, D**-0.5)
    error = {name: float((over(kernel)() - expected).abs().max()) for name, kernel in kernels.items()}
    runs = {name: (replayed if cuda else in_turn)([over(kernel, i % layers) for i in range(20)])
            for name, kernel in kernels.items()}
    times = {name: [x / 20 for x in ms] for name, ms in interleaved(runs, rounds, device).items()}
    return {"what": "attention", "shape": shape, "batch": batch, "context": context, "tokens": S,
            "ms": {name: spread(ms) for name, ms in times.items()}, "error": error,
            **made(0, rounds, device, dtype)}


def bench_attention(batches: list[int], contexts: list[int], device: str, dtype: str, rounds: int) -> None:
    print(f"milliseconds of one layer, medians and quartiles (lower is better), {machine(device)}, "
          f"{dtype}")
    for shape in HEADS:
        for batch in batches:
            for context in contexts:
                for S in (1, 4):
                    key = dict(shape=shape, batch=batch, context=context, tokens=S)
                    row = known(rounds, device, dtype, what="attention", **key)
                    if row is None:
                        row = attention_row(shape, batch, context, S, device, dtype, rounds)
                        append_row(FILE, row)
                    print(f"{shape:>5} batch {batch:>2} context {context:>6} tokens {S}: "
                          + ", ".join(f"{name} {in_words(ms, digits=3)}" for name, ms in row["ms"].items()),
                          flush=True)


# ---- the cost of a step -----------------------------------------------------------------------------------


# tokens; steps over fewer are cheaper than the line of those over more, for what the processor's caches hold
LONG = 2048


def step_times(model, batches: Sequence[int], contexts: Sequence[int],
               rounds: int) -> dict[int, list[list[float]]]:
    """Milliseconds of a decode step, batches x contexts x rounds, caches filled with random keys. Each
    follows an untimed one over the same keys, as a step follows another while an answer is written; every
    round takes all cells in another order, so that whatever else the machine does is spread."""
    lms = {batch: rstitch.CachedLM(model, batch, max(contexts) + 1) for batch in batches}
    times: dict[int, list[list[float]]] = {batch: [[] for _ in contexts] for batch in batches}
    for batch, lm in lms.items():
        lm.read(range(batch), [[5]] * batch)
        for layer in lm.layers:
            for tensor in (layer.keys, layer.values):
                tensor.normal_(generator=torch.Generator(tensor.device).manual_seed(0))
    cells = [(batch, k) for batch in batches for k in range(len(contexts))]
    for i in tracked(range(rounds + 1), "steps"):
        for batch, k in np.random.default_rng(i).permutation(cells).tolist():
            lm = lms[batch]
            for _ in range(2):
                lm.cursor = [contexts[k]] * batch
                start = now(model.device)
                lm.read(range(batch), [[7]] * batch).token.tolist()
            if i:
                times[batch][k].append(1e3 * (now(model.device) - start))
    for lm in lms.values():
        lm.close()
    return times


def fit_line(contexts: Sequence[int], times: list[list[float]]) -> dict:
    """Decode time as the latency model has it, c n + d, to the medians by relative least squares; and what a
    further term in n^2 would add at the largest context, as a share of the time there, with a 95 % interval
    over rounds."""
    n = np.array(contexts, float)

    def fit(ms: np.ndarray, *powers: int) -> np.ndarray:
        return np.linalg.lstsq(np.stack([n**p / ms for p in powers], 1), np.ones_like(ms), rcond=None)[0]

    def share(*times) -> float:
        terms = fit(np.median(times, 1), 0, 1, 2) * [1, n[-1], n[-1] ** 2]
        return float(terms[2] / terms.sum())

    ms = np.median(times, 1)
    d, c = fit(ms, 0, 1)
    error = np.abs((c * n + d) / ms - 1)
    return {"d_ms": float(d), "c_ms": float(c), "median_error": float(np.median(error)),
            "largest_error": float(error.max()),
            "square_share": [share(*times), *bootstrap(share, *times)]}


def key_prices(contexts: Sequence[int], times: dict[int, list[list[float]]],
               totals: Sequence[int] = (1024, 4096, 8192, 32768)) -> dict[str, dict[int, list[float]]]:
    """Microseconds that a key costs between one number of keys in all rows together and the next, with a 95 %
    interval over rounds, for each batch whose contexts hold both. Where it is the same at every batch size,
    what bends the line is how memory is read and not the loop."""
    out: dict[str, dict[int, list[float]]] = {}
    for low, high in itertools.pairwise(totals):
        prices = out[f"{low:,} to {high:,}"] = {}
        for b, rows in times.items():
            if low // b in contexts and high // b in contexts:

                def price(first, last, keys=high - low) -> float:
                    return 1e3 * (np.median(last) - np.median(first)) / keys

                ends = [rows[contexts.index(keys // b)] for keys in (low, high)]
                prices[b] = [float(price(*ends)), *bootstrap(price, *ends)]
    return out


def bench_steps(rounds: int) -> None:
    model, contexts = load_pocket()[1], (64, 256, 512, 1024, *range(LONG, 8193, 1024))
    torch.set_num_threads(1)
    times = step_times(model, (1, 4, 16), contexts, rounds)
    long = contexts.index(LONG)
    row = {"what": "steps", "contexts": contexts,
           "ms": {b: [spread(ms) for ms in rows] for b, rows in times.items()},
           "fit": {b: fit_line(contexts, rows) for b, rows in times.items()},
           "fit_long": {b: fit_line(contexts[long:], rows[long:]) for b, rows in times.items()},
           "key_us": key_prices(contexts, times), **made(0, rounds)}
    append_row(FILE, row)
    print(show_steps(row))
    plot_steps(row, RESULTS / "steps.png")


def show_steps(row: dict) -> str:
    lines = [f"batch {b:>2}: {f['c_ms']:.3g} n_kv + {f['d_ms']:.2f} ms; error of the line: median "
             f"{100 * f['median_error']:.1f} %, largest {100 * f['largest_error']:.1f} %; "
                     f"a term in n_kv^2 would be {signed([100 * x for x in f['square_share']], unit=' %')} "
                     f"of the time at {row['contexts'][-1]}{what}"
                     for fits, what in (("fit", ""), ("fit_long", f", fitted from {LONG:,} tokens on"))
             for b, f in row[fits].items()]
    return "\n".join(lines + [f"keys in all {keys}: a key costs, in us, "
                              + ", ".join(f"{with_interval(price)} (batch {b})"
                                          for b, price in prices.items())
                              for keys, prices in row["key_us"].items()])


def plot_steps(row: dict, path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    n = np.array(row["contexts"])
    for (b, points), colour in zip(row["ms"].items(), ("#0072B2", "#E69F00", "#009E73")):
        median, low, high = np.array(points).T
        ax.errorbar(n, median, [median - low, high - median], fmt="o", color=colour, capsize=3)
        for fits, style in (("fit", "-"), ("fit_long", ":")):
            ax.plot(n, row[fits][b]["c_ms"] * n + row[fits][b]["d_ms"], style, color=colour)
        ax.annotate(f"batch {b}", (n[-1], median[-1]), (4, 0), textcoords="offset points", color=colour,
                    va="center")
    ax.set(xlabel="tokens in the cache, n_kv", ylabel="one decode step (ms), lower is better",
           title="Decode steps of the pocket LLM, and the line of the latency model\n(dotted: fitted from "
                 f"{LONG:,} tokens on)", xlim=(0, 1.12 * n[-1]))
    figure.savefig(path, dpi=100)
    plt.close(figure)


# ---- schedules --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Script:
    """Who writes: the LLM's share of the tokens and the mean length of its visits, in tokens."""

    share: float
    visit: float

    def __post_init__(self):
        if not 0 < self.share < 1 or not self.visit >= 1:
            raise ValueError(f"--share {self.share} --visit {self.visit}: expected a share in (0, 1) and "
                             "visits of 1 token or more")

    def leaves(self, batch: int, tokens: int, seed: int = 0) -> np.ndarray:
        """(2, batch, tokens) bool: does the SLM, the LLM leave at this position? The LLM writes the first
        token and hands back, so that both have read the prompt."""
        stay = 1 - 1 / self.visit
        # of RandomRouter, whose share is p / (1 - stay (1 - p))
        p = self.share * (1 - stay) / (1 - self.share * stay)
        out = np.random.default_rng(seed).random((2, batch, tokens)) < np.array([p, 1 - stay])[:, None, None]
        out[1, :, 0] = True
        return out


class Cursors:
    """Stands in for a CachedLM where reads are grouped and not made."""

    width = rstitch.CachedLM.width

    def __init__(self, batch: int, graphs: bool, packs: bool):
        self.cursor, self.graphs, self.free = [0] * batch, graphs, rstitch.FREE["cuda" if graphs else "cpu"]
        self.packs = packs


def simulate(leaves: np.ndarray, cost: Callable[[int, list[int]], float], rule=rstitch.next_model,
             graphs: bool = False, packs: Sequence[bool] = (False, False)) -> tuple[float, int, int]:
    """(time, tokens written in it, longest wait in calls) of a script under a schedule: what the loop of
    `stitch` would take if its reads were all. cost(model, unread) is the time of one read, unread being the
    tokens of each row that takes part. packs: whether the reads of SLM and LLM need no pads. Both models have
    read the prompt but for its last token; the clock starts when every row has its second token."""
    _, B, N = leaves.shape
    rows = [rstitch.Row(i, 0, [0], 1, rstitch.LLM, slot=i) for i in range(B)]
    lms, waited = [Cursors(B, graphs, one) for one in packs], [0] * B
    clock, start, longest, model, in_a_row = 0.0, (0.0, 0), 0, rstitch.LLM, 0
    while live := [row for row in rows if len(row.ids) <= N]:
        chosen = rule(live, model, in_a_row)
        model, in_a_row = chosen, in_a_row + 1 if chosen == model else 1
        active = [row for row in live if row.active == model]
        for row in live:
            waited[row.index] = 0 if row.active == model else waited[row.index] + 1
        longest = max(longest, *waited)
        for group in rstitch.similar_lengths(active, lms[model]):
            clock += cost(model, [len(row.ids) - lms[model].cursor[row.index] for row in group])
            for row in group:
                lms[model].cursor[row.index] = len(row.ids)
                left = leaves[model, row.index, len(row.ids) - 1]
                if model == rstitch.LLM or not left:
                    row.ids.append(0)
                if left:
                    row.active = 1 - model
        if not start[1] and min(len(row.ids) for row in rows) > 2:
            start = clock, sum(len(row.ids) - 1 for row in rows)
    return clock - start[0], B * N - start[1], longest


def weighed(ratio: float, power: float):
    """A rule that runs the model whose waiting rows, over its cost to some power, are more; patience bounds
    the wait as in `next_model`."""

    def rule(rows: list[rstitch.Row], last: int, in_a_row: int) -> int:
        waiting = [sum(row.active == m for row in rows) / (ratio**power if m else 1.0)
                   for m in (rstitch.SLM, rstitch.LLM)]
        other = 1 - last
        return other if waiting[other] and (waiting[other] > waiting[last]
                                            or in_a_row >= rstitch.PATIENCE) else last

    return rule


def bench_schedule(tokens: int = 400, draws: int = 4) -> None:
    print("tokens per time relative to the rule that rstitch keeps (most rows waiting, patience 8), higher "
          "is better; and the longest wait in calls\n"
          f"{'LLM / SLM':>9} {'batch':>6} {'share':>6} {'visit':>6} {'rows over the root of the cost':>31} "
          f"{'rows over the cost':>19}")
    for ratio in (2, 5, 10):
        for batch in (4, 16):
            for script in (Script(0.1, 1), Script(0.25, 1), Script(0.25, 4)):
                cost = lambda model, unread: ratio if model else 1.0  # noqa: B023, E731
                taken = {power: [simulate(script.leaves(batch, tokens, seed), cost, rule)
                                 for seed in range(draws)]
                         for power, rule in ((None, rstitch.next_model), (0.5, weighed(ratio, 0.5)),
                                             (1.0, weighed(ratio, 1.0)))}
                rate = {power: sum(n for _, n, _ in runs) / sum(ms for ms, *_ in runs)
                        for power, runs in taken.items()}
                cells = [f"{rate[power] / rate[None]:.2f} ({max(w for *_, w in taken[power])})"
                         for power in (0.5, 1.0)]
                print(f"{ratio:>9} {batch:>6} {script.share:>6} {script.visit:>6} {cells[0]:>31} "
                      f"{cells[1]:>19}   kept: longest wait {max(w for *_, w in taken[None])}")


# ---- real shapes ------------------------------------------------------------------------------------------


class ScriptRouter:
    """Decides as a script says."""

    first = rstitch.LLM

    def __init__(self, leaves: np.ndarray, device: str):
        self.leaves, self.rows = torch.from_numpy(leaves).to(device), {}

    def decide(self, model: int, step: rstitch.Step) -> torch.Tensor:
        """What the script says. Which rows are there is kept on the device: a copy would wait for the read to
        end."""
        key = tuple(step.rows)
        if key not in self.rows:
            self.rows[key] = torch.tensor(key, device=self.leaves.device)
        return self.leaves[model, self.rows[key], step.position]

    def leave_slm(self, step: rstitch.Step) -> torch.Tensor:
        return self.decide(rstitch.SLM, step)

    def leave_llm(self, step: rstitch.Step) -> torch.Tensor:
        return self.decide(rstitch.LLM, step)


class TimedLM(rstitch.CachedLM):
    """Notes every read: when it began (s), tokens of its longest row, milliseconds."""

    def __init__(self, *args):
        super().__init__(*args)
        self.times: list[tuple[float, int, float]] = []

    def read(self, rows, tokens, *args):
        start = now(self.model.device)
        out = super().read(rows, tokens, *args)
        self.times.append((start, max(map(len, tokens)), 1e3 * (now(self.model.device) - start)))
        return out


def timed_stitch(lms, ids: torch.Tensor, router, tokens: int, first: int) -> tuple[float, int, float]:
    """(milliseconds, tokens kept) from the moment on when every row has `first` tokens, and that moment
    (s)."""
    count, marks = [0] * len(ids), []

    def on_token(row: int, call: rstitch.Call) -> None:
        count[row] += call.kept
        if not marks and min(count) >= first:
            marks.extend((now(lms[0].model.device), sum(count)))

    rstitch.stitch(*lms, ids, router, max_new_tokens=tokens, eos_token_id=[], pad_token_id=0, seed=0,
                   on_token=on_token)
    return 1e3 * (now(lms[0].model.device) - marks[0]), sum(count) - marks[1], marks[0]


def read_cost(lms, context: int, rounds: int) -> Callable[[int, list[int]], float]:
    """cost(model, unread) for `simulate`: medians of reads of rows alike in length, timed alone, when first
    asked for. Rows that are packed cost what as many of their mean length do, on the line between two."""
    table: dict[tuple[int, int, int], float] = {}

    def timed(*key: int) -> float:
        model, rows, width = key
        if key not in table:
            lm = lms[model]

            def once() -> None:
                lm.cursor = [min(context, lm.max_len - width)] * lm.batch_size
                lm.read(range(rows), [[7] * width] * rows).token.tolist()

            table[key] = float(np.median(interleaved({"read": once}, rounds, lm.model.device)["read"]))
        return table[key]

    def cost(model: int, unread: list[int]) -> float:
        rows, lm = len(unread), lms[model]
        if not lm.packs:
            return timed(model, rows, lm.width(max(unread)))
        width, over = divmod(sum(unread), rows)
        more = over and (timed(model, rows, width + 1) - timed(model, rows, width)) * over / rows
        return timed(model, rows, width) + more

    return cost


def generate_ms(model, ids: torch.Tensor, tokens: int, **options) -> float:
    """Milliseconds of the tokens after the first, by generate()."""
    device, times = model.device, []
    for n in (tokens, 1):
        start = now(device)
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n,
                       min_new_tokens=n, pad_token_id=0, **options)
        times.append(now(device) - start)
    return 1e3 * (times[0] - times[1])


def race(models, lms, names: list[str], ids: torch.Tensor, leaves: np.ndarray, rounds: int,
         label: str) -> dict[str, list[float]]:
    """tokens/s of every way to write, by round, but for a first one."""
    batch, tokens, device = len(ids), leaves.shape[2], models[0].device
    figures: dict[str, list[float]] = {}

    def note(name: str, ms: float, written: int, *_) -> None:
        figures.setdefault(name, []).append(1e3 * written / ms)

    for i in tracked(range(rounds + 1), label):
        for m, name in enumerate(names):
            note(f"{name} alone", *timed_stitch(lms, ids, (rstitch.SLMOnly, rstitch.LLMOnly)[m](), tokens, 1))
            note(f"{name} generate()", generate_ms(models[m], ids, tokens), batch * (tokens - 1))
            static = generate_ms(models[m], ids, tokens, cache_implementation="static")
            note(f"{name} generate(), static cache", static, batch * (tokens - 1))
        note("stitched", *timed_stitch(lms, ids, ScriptRouter(leaves, device), tokens, 2))
        if batch == 1:
            with same_width(*models):
                drafted = generate_ms(models[1], ids, tokens, assistant_model=models[0])
            note("assisted generation", drafted, tokens - 1)
        if not i:
            warm = {name: len(x) for name, x in figures.items()}
    return {name: x[warm[name]:] for name, x in figures.items()}


def time_spent(models, names: list[str], longest: int, ids: torch.Tensor, leaves: np.ndarray,
               graphs: bool) -> dict[str, float]:
    """Milliseconds of a stitched token, by what they are spent on."""
    timed = [TimedLM(model, len(ids), longest, graphs) for model in models]
    for _ in range(2):  # the first time graphs are captured
        whole, n, start = timed_stitch(timed, ids, ScriptRouter(leaves, models[0].device), leaves.shape[2], 2)
    parts = {}
    for name, lm in zip(names, timed):
        for what in ("single tokens", "catching up"):
            parts[f"{name}, {what}"] = sum(ms for at, width, ms in lm.times
                                           if at >= start and (width == 1) == (what == "single tokens"))
        lm.close()
    return {part: ms / n for part, ms in parts.items()} | {
        "router, entropy, bookkeeping": (whole - sum(parts.values())) / n}


def forget(device: str) -> None:
    """Free what the models of the last cell held on a GPU."""
    gc.collect()
    # generate() compiles its static cache: what it holds of dead models, and its limit of eight shapes
    torch.compiler.reset()
    torch.cuda.empty_cache()


def shapes_row(pair: str, batch: int, context: int, script: Script, tokens: int, rounds: int, device: str,
               dtype: str) -> dict:
    """One cell: tokens/s of every way to write, milliseconds per step against the floor, where the time goes,
    the simulated ceiling, memory."""
    names, kind, cuda = pair.split("+"), getattr(torch, dtype), torch.device(device).type == "cuda"
    longest = context + tokens + rstitch.BLOCK
    sizes = [bytes_of(name, batch, longest, kind.itemsize) for name in names]
    needed = sum(w + 2 * c for w, _, c in sizes) + 2e9
    key = {"what": "shapes", "pair": pair, "batch": batch, "context": context, "share": script.share,
           "visit": script.visit, "new_tokens": tokens, **made(0, rounds, device, dtype)}
    if cuda:
        forget(device)
        if needed > 0.95 * torch.cuda.mem_get_info(device)[0]:
            return key | {"fits": False, "needed_gb": needed / 1e9}
    limits = measure_limits(device, kind, products([1024], device, kind, 5))
    leaves = script.leaves(batch, tokens)
    models = [build(name, longest, device, kind, seed) for seed, name in enumerate(names)]
    ids = torch.randint(10, 1000, (batch, context), generator=torch.Generator().manual_seed(0)).to(device)
    lms = [rstitch.CachedLM(model, batch, longest, graphs=cuda) for model in models]
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    # graphs are captured, and generate() holds nothing yet
    timed_stitch(lms, ids, ScriptRouter(leaves, device), tokens, 2)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if cuda else None
    speed = race(models, lms, names, ids, leaves, rounds, f"{pair}, batch {batch}, context {context}")
    cost = read_cost(lms, context + tokens // 2, 5)
    simulated, written, wait = simulate(leaves, cost, graphs=cuda, packs=[lm.packs for lm in lms])
    steps = {name: cost(m, [1] * batch) for m, name in enumerate(names)}
    for lm in lms:
        lm.close()
    del lms, cost  # and so their caches, before the next are made
    floors = {name: limits.floor(name, batch, context + tokens // 2, kind.itemsize)[0] for name in names}
    return key | {"fits": True, "tokens_per_s": {name: spread(x) for name, x in speed.items()},
                  "step_ms": steps,
                  "floor_ms": floors, "of_floor": {name: floors[name] / steps[name] for name in names},
                  "stream_gb_per_s": limits.stream / 1e9, "peak_gflop_per_s": limits.peak / 1e9,
                  "simulated_tokens_per_s": 1e3 * written / simulated,
                  "longest_wait_calls": wait,
                  "spent_ms_per_token": time_spent(models, names, longest, ids, leaves, cuda),
                  "peak_gb": peak, "weights_and_caches_gb": sum(w + c for w, _, c in sizes) / 1e9}


def show_shapes(row: dict) -> str:
    head = (f"{row['pair']}, batch {row['batch']}, context {row['context']}, {100 * row['share']:g} % LLM in "
            f"visits of {row['visit']:g}, {row['machine']}, {row['dtype']}")
    if not row["fits"]:
        return f"{head}: does not fit: {row['needed_gb']:.0f} GB"
    lines = [head, *(f"  {name:32} {in_words(x, ' tokens/s', 1)}" for name, x in row["tokens_per_s"].items())]
    lines.append(f"  simulated ceiling                {row['simulated_tokens_per_s']:.1f} tokens/s, reached "
                 f"{100 * row['tokens_per_s']['stitched'][0] / row['simulated_tokens_per_s']:.0f} %; "
                 f"longest wait of a row {row['longest_wait_calls']} calls")
    lines += [f"  {name} step {row['step_ms'][name]:.2f} ms, floor {row['floor_ms'][name]:.2f} ms at "
              f"{row['stream_gb_per_s']:.0f} GB/s and {row['peak_gflop_per_s']:.0f} GFLOP/s: "
              f"{100 * row['of_floor'][name]:.0f} % of it reached"
              for name in row["step_ms"]]
    lines.append("  where a stitched token's time goes: "
                 + ", ".join(f"{part} {ms:.2f} ms" for part, ms in row["spent_ms_per_token"].items()))
    if row["peak_gb"]:
        lines.append(f"  peak memory {row['peak_gb']:.1f} GB, weights and caches "
                     f"{row['weights_and_caches_gb']:.1f} GB")
    return "\n".join(lines)


def bench_shapes(pairs: list[str], batches: list[int], contexts: list[int], script: Script, tokens: int,
                 rounds: int, device: str, dtype: str) -> None:
    for pair in pairs:
        for context in contexts:
            for batch in batches:
                row = known(rounds, device, dtype, what="shapes", pair=pair, batch=batch, context=context,
                            share=script.share, visit=script.visit, new_tokens=tokens)
                if row is None:
                    row = shapes_row(pair, batch, context, script, tokens, rounds, device, dtype)
                    append_row(FILE, *[row] * row["fits"])  # what did not fit may fit another time
                print(show_shapes(row), flush=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--slots", type=int, metavar="N", help="N rows in the caches, refilled, against batches of N")
    add("--problems", type=int, default=300,
        help="--slots: problems of the pocket domain (default: %(default)s)")
    add("--branches", action="store_true",
        help="what it costs to go on from inside of answers, against their length")
    add("--attention", action="store_true", help="ways to attend to a cache")
    add("--steps", action="store_true", help="time per token against context and batch")
    add("--schedule", action="store_true", help="rules for who runs next, simulated")
    add("--shapes", nargs="+", metavar="SMALL+LARGE", help=f"pairs of {', '.join(SHAPES)}")
    add("--rounds", type=int, default=12, help="measured rounds (default: %(default)s)")
    add("--new-tokens", type=int, default=100, help="tokens per answer (default: %(default)s)")
    add("--batch", type=int, nargs="+", default=[1, 16], help="--attention, --shapes: rows (default: 1 16)")
    add("--context", type=int, nargs="+", default=[1024],
        help="--attention, --shapes: tokens in the cache (default: 1024)")
    add("--share", type=float, default=0.25,
        help="--shapes: of the tokens, how many the LLM writes (default: %(default)s)")
    add("--visit", type=float, default=2.0,
        help="--shapes: mean length of the LLM's visits, in tokens (default: %(default)s)")
    add("--device", type=usable_device, default="cpu",
        help="--attention, --shapes: torch device (default: %(default)s)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32",
        help="--attention, --shapes (default: %(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)")
    return parser


def script_of(args: argparse.Namespace) -> Script:
    """The script that the options name. ValueError for options that cannot be."""
    if args.slots is not None:
        rstitch.check_count("--slots", args.slots)
    for name, least in (("rounds", 1), ("new_tokens", 3), ("threads", 1), ("problems", 1)):
        rstitch.check_count(f"--{name.replace('_', '-')}", getattr(args, name), least)
    for value in (*args.batch, *args.context):
        rstitch.check_count("--batch and --context", value)
    for pair in args.shapes or ():
        if len(pair.split("+")) != 2 or not set(pair.split("+")) <= SHAPES.keys():
            raise ValueError(f"--shapes {pair}: expected two of {', '.join(SHAPES)}, joined by +")
    return Script(args.share, args.visit)


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    try:
        script = script_of(args)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(args.threads)
    if args.slots:
        bench_slots(args.slots, args.problems, args.rounds)
    if args.branches:
        bench_branches(args.rounds)
    if args.attention:
        bench_attention(args.batch, args.context, args.device, args.dtype, args.rounds)
    if args.steps:
        bench_steps(args.rounds)
    if args.schedule:
        bench_schedule()
    if args.shapes:
        bench_shapes(args.shapes, args.batch, args.context, script, args.new_tokens, args.rounds, args.device,
                     args.dtype)
    if not (args.slots or args.branches or args.attention or args.steps or args.schedule or args.shapes):
        bench_loop(args.new_tokens, args.rounds)


if __name__ == "__main__":
    start(main)
