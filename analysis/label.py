"""Labels for R2R: which tokens of the SLM lead the LLM's reasoning astray? (arXiv 2505.21600, section 3)

    python -m analysis.label                 pocket pair: 2,000 router-train problems, shares of other splits
    python -m analysis.label --report        and figures of the labels
    P="--slm SMALL --llm LARGE --problems file.jsonl"
    python -m analysis.label $P --judge JUDGE --out labels --device cuda --dtype bfloat16

Rows: a file per stage in the folder --out, a row a problem; labels.json with --report.
Feeds: the results page's paragraph on labels; notebook 3; `analysis.train_r2r`.

Four stages:

    answers     the LLM answers; its token ids are kept, and nothing is ever tokenised again
    readings    the SLM reads that answer, teacher forced: its own choice and its entropy at every position
    branches    where they differ the LLM goes on from the SLM's token to the end of the sentence or answer
    labels      a judge compares that with the LLM's own text:
                I identical, N neutral, D divergent, U unjudged

A stage works through blocks of problems in order and appends a block at a time, so a run that was killed goes
on from its last whole block and ends with the same bytes. End-of-answer and end-of-thinking tokens are
labelled like any other; prompts are not. What a judge cannot decide is U, never "not divergent".
"""
import argparse
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache

import rstitch
from analysis.instruments.checkpoints import CHECKPOINTS
from analysis.instruments.judges import ENCODED, JUDGES, Case, build_judge
from analysis.instruments.options import add_options, given, option
from analysis.instruments.pool import parallel_map
from analysis.instruments.problems import question, read_problems, split_of
from analysis.instruments.progress import progress, tracked
from analysis.instruments.provenance import provenance
from analysis.instruments.rows import RESULTS, read_rows, write_rows
from analysis.instruments.runs import by_place, run_stage, settle
from analysis.instruments.stats import PAPER_LABELS, bootstrap, kind_of, ratio_of_means
from analysis.instruments.task import Pair, branches_together, common_vocab, counter, decoder
from analysis.pocket.domain import problems
from rstitch import fingerprint
from rstitch_hf.loading import left_padded, load_tokenizer
from rstitch_hf.ranks import rank, start
from rstitch_hf.serving import cache_keyword, context_of, device_of

FOLDER = CHECKPOINTS / "labels"
# problems of the pocket domain, as shares of --n
SIZES = {"router-train": 1.0, "dev": 0.15, "calibration": 0.15, "test": 0.25}
BOUNDARY = re.compile(r"[.!?][\"')\]]*\s|\n")  # a decimal point has no space behind it


@dataclass(frozen=True)
class Settings(Pair):
    """How labels are made. All that is written follows from it and from the problems."""

    judge: str = option("statement",
                        "statement (the pocket domain: what the sentence states), answer (go on to the end, "
                        "compare the final answers), numbers (those that a sentence states), numbers+ENCODER "
                        "(and how near embeddings lie, by a model such as "
                        "sentence-transformers/all-MiniLM-L6-v2), or a causal LM that is asked, a "
                        "Hugging Face name or path")
    sentence_tokens: int = option(160, "longest continuation of a sentence, in tokens; one that is longer is "
                                       "unjudged")
    block: int = option(32, "problems worked on together")

    def __post_init__(self):
        super().__post_init__()
        for name in ("sentence_tokens", "block"):
            rstitch.check_count(f"--{name.replace('_', '-')}", getattr(self, name))


# ---- sentences --------------------------------------------------------------------------------------------


def boundary(text: str, before: int) -> re.Match | None:
    """The first end of a sentence at character `before` or behind it. White space alone is no sentence."""
    return BOUNDARY.search(text, before + len(text[before:]) - len(text[before:].lstrip()))


def closed(text: str, before: int) -> bool:
    """Does a sentence of `text` end at character `before` or behind it?"""
    return boundary(text, before) is not None


def sentence_end(decode: Callable[[list[int]], str], ids: list[int], start: int, t: int,
                 eos: Sequence[int]) -> int | None:
    """Index behind the sentence that holds token t; decoding starts at token `start` <= t. None where it is
    cut off.

    That a sentence is over shows only in the space that follows, which often belongs to the next token.
    """
    before = len(decode(ids[start:t]))
    for end in range(t + 1, len(ids) + 1):
        if found := boundary(decode(ids[start:end]), before):
            last = len(decode(ids[start:end - 1]))  # where the last token begins
            return end - 1 if found.start() < last == found.end() - 1 else end
    return len(ids) if ids[-1] in eos else None


def sentences(decode, ids: list[int], eos: Sequence[int]) -> list[int]:
    """First token of each sentence."""
    starts, end = [], 0
    while end is not None and end < len(ids):
        starts.append(end)
        end = sentence_end(decode, ids, end, end, eos)
    return starts


def opening(starts: list[int], t: int) -> int:
    """Where the text that a judge compares begins: the last sentence that begins before t. At the first token
    of a sentence that is the one before it, since there the branches may differ in whether a sentence is
    over."""
    return max((s for s in starts if s < t), default=0)


# ---- stages -----------------------------------------------------------------------------------------------


def answers(settings: Settings, rows: list[dict]) -> list[dict]:
    """What the LLM says to each question."""
    slm, llm, tokenizer, eos = settings.load()
    ids, mask = settings.encode(tokenizer, *(row["question"] for row in rows))
    with progress(len(rows), "answers of a block", inner=True) as bar:
        out = rstitch.stitch(slm, llm, ids, rstitch.LLMOnly(), attention_mask=mask,
                             max_new_tokens=settings.max_new_tokens, seed=0, slots=settings.rows,
                             on_token=counter(bar, eos, [settings.max_new_tokens] * len(rows)))
    return [{**row, "prompt": prompt, "answer": [call.token for call in calls]}
            for row, prompt, calls in zip(rows, rstitch.unpadded(ids, mask), out.calls)]


@torch.inference_mode()
def teacher_forced(model, prompt: list[int], answer: list[int],
                   chunk: int = 512) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What the model predicts at every position of an answer that it reads: (hidden states (n, D), logits (n,
    V)), in order, in pieces."""
    ids = torch.tensor([prompt + answer[:-1]], device=device_of(model))
    cache, caught = {cache_keyword(model): DynamicCache(config=model.config)}, {}
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, args: caught.update(hidden=args[0][0]))
    try:
        for start in range(0, ids.shape[1], chunk):
            logits = model(input_ids=ids[:, start:start + chunk], use_cache=True, **cache).logits[0]
            skip = max(0, len(prompt) - 1 - start)
            if skip < len(logits):
                yield caught["hidden"][skip:], logits[skip:]
    finally:
        hook.remove()


def read_along(model, prompt: list[int], answer: list[int], vocab: int) -> tuple[list[int], list[float]]:
    """What a model would write at every token of an answer that it reads, and its entropy there in nats."""
    pieces = [(logits[:, :vocab].argmax(-1), rstitch.entropy(logits[:, :vocab]))
              for _, logits in teacher_forced(model, prompt, answer)]
    choice, H = (torch.cat(part).tolist() for part in zip(*pieces))
    return choice, H


def readings(settings: Settings, rows: list[dict]) -> list[dict]:
    """The SLM's choice and its entropy (nats) at every token of the LLM's answers."""
    slm, *_ = pair = settings.load()
    vocab, out = common_vocab(pair), []
    for row in tracked(rows, "readings of a block", inner=True):
        choice, H = read_along(slm, row["prompt"], row["answer"], vocab)
        out.append({"slm": choice, "entropy": [float(f"{h:.4g}") for h in H]})
    return out


def goes_on_to_the_end(settings: Settings) -> bool:
    """Does the judge want whole answers rather than sentences?"""
    return settings.judge == "answer"


def go_on(settings: Settings, todo: list[tuple[list[int], list[int], int]]) -> list[list[int] | None]:
    """What the LLM writes after each (prompt, answer so far, first token that is decoded), to the end of the
    sentence that holds the answer's last token, or to the end of the answer. None where that is not
    reached."""
    slm, llm, tokenizer, eos = settings.load()
    decode, whole, out = decoder(tokenizer), goes_on_to_the_end(settings), [[] if answer[-1] in eos else None
                                                                            for _, answer, _ in todo]
    length = settings.max_new_tokens if whole else settings.sentence_tokens
    fits = [len(prompt) + len(answer) + length <= min(context_of(slm), context_of(llm))
            for prompt, answer, _ in todo]
    open_ones = [k for k, more in enumerate(out) if more is None and fits[k]]
    if not open_ones:
        return out
    open_ones = branches_together(open_ones, [prompt for prompt, *_ in todo],
                                  [len(answer) for _, answer, _ in todo])
    ids, mask = left_padded([todo[k][0] + todo[k][1] for k in open_ones])
    before = [len(decode(todo[k][1][todo[k][2]:-1])) for k in open_ones]

    def complete(b: int, more: list[int]) -> bool:
        _, answer, start = todo[open_ones[b]]
        done = closed(decode(answer[start:] + more), before[b])
        bar.update(done)
        return done

    limits = [max(1, length - len(todo[k][1])) if whole else length for k in open_ones]
    with progress(len(open_ones), "branches of a block", inner=True) as bar:
        stitched = rstitch.stitch(slm, llm, ids, rstitch.LLMOnly(), attention_mask=mask, seed=0,
                                  max_new_tokens=limits, slots=settings.rows,
                                  stop=None if whole else complete, on_token=counter(bar, eos, limits))
    for k, calls in zip(open_ones, stitched.calls):
        _, answer, start = todo[k]
        line = answer + [call.token for call in calls]
        end = (len(line) if line[-1] in eos
               else None) if whole else sentence_end(decode, line, start, len(answer) - 1, eos)
        out[k] = None if end is None else line[len(answer):end]
    return out


def branches(settings: Settings, rows: list[dict]) -> list[dict]:
    """[t, token ids] of every position t where the SLM differs: its token, and how the LLM goes on from
    there; None where that or the LLM's own sentence is cut off."""
    *_, tokenizer, eos = settings.load()
    decode, whole = decoder(tokenizer), goes_on_to_the_end(settings)
    found: list[dict[int, list[int] | None]] = [{} for _ in rows]
    todo = {}
    for i, row in enumerate(rows):
        answer, starts = row["answer"], sentences(decode, row["answer"], eos)
        for t, (own, choice) in enumerate(zip(answer, row["slm"])):
            if own != choice:
                found[i][t], start = None, opening(starts, t)
                if (answer[-1] in eos) if whole else sentence_end(decode, answer, start, t, eos) is not None:
                    todo[i, t] = row["prompt"], answer[:t] + [choice], start
    for (i, t), more in zip(todo, go_on(settings, list(todo.values()))):
        found[i][t] = None if more is None else [rows[i]["slm"][t]] + more
    return [{"branches": [[t, branch] for t, branch in one.items()]} for one in found]


def cases_of(settings: Settings, row: dict) -> dict[int, Case]:
    """What there is to judge of one problem, by position."""
    *_, tokenizer, eos = settings.load()
    decode, whole = decoder(tokenizer), goes_on_to_the_end(settings)
    starts, cases = sentences(decode, row["answer"], eos), {}
    for t, branch in row["branches"]:
        if branch is not None:
            start = opening(starts, t)
            end = len(row["answer"]) if whole else sentence_end(decode, row["answer"], start, t, eos)
            own, other = row["answer"][start:end], row["answer"][start:t] + branch
            cases[t] = Case(row["question"], decode(row["answer"][:start]), decode(own).strip(),
                            decode(other).strip())
    return cases


def labels(settings: Settings, rows: list[dict]) -> list[dict]:
    """One letter per token of the answer."""
    judge = build_judge(settings.judge, settings.device, settings.dtype)
    cases = [(i, t, case) for i, row in enumerate(rows) for t, case in cases_of(settings, row).items()]
    same: dict[tuple[int, int], bool | None] = {}
    for at in range(0, len(cases), settings.rows):
        part = cases[at:at + settings.rows]
        verdicts = judge([case for *_, case in part])
        if len(verdicts) != len(part):
            raise ValueError(f"judge {settings.judge} gave {len(verdicts)} verdicts on {len(part)} cases: "
                             "expected one each")
        same |= {(i, t): verdict for (i, t, _), verdict in zip(part, verdicts)}
    letters = {True: "N", False: "D"}
    return [{"labels": "".join("I" if own == choice else letters.get(same.get((i, t)), "U")
                               for t, (own, choice) in enumerate(zip(row["answer"], row["slm"])))}
            for i, row in enumerate(rows)]


STAGES = {"answers": answers, "readings": readings, "branches": branches, "labels": labels}


def check_folder(folder: Path, settings: Settings, todo: list[dict]) -> None:
    """Write down what a folder's labels are made with; ValueError where it holds those of other settings or
    problems."""
    slm, llm, *_ = settings.load()
    if settings.judge.startswith(ENCODED):  # one that cannot be had is told now, not after hours
        build_judge(settings.judge, settings.device, settings.dtype)
    elif settings.judge not in JUDGES:
        load_tokenizer("--judge", settings.judge)
    made = {name: value for name, value in settings.record().items() if name not in ("slm", "llm")}
    settle(folder, {"settings": made, "slm": fingerprint(slm), "llm": fingerprint(llm)}, "labels")
    for at, old in by_place(folder / "answers.jsonl").items():
        new = todo[at] if at < len(todo) else old
        if (old["question"], old["split"]) != (new["question"], new["split"]):
            raise ValueError(f"--out {folder} holds labels of other problems: its {old['split']} has "
                             f"{old['question']!r} "
                             f"where {new['question']!r} is asked for")


def make_labels(settings: Settings, todo: list[dict], folder: Path, workers: int = 1) -> list[dict]:
    """Label the LLM's answers to `todo`, rows {question, split}, in the folder; the rows with what every
    stage added."""
    check_folder(folder, settings, todo)
    rows = todo
    with parallel_map(workers, __name__) as run:
        for name, stage in STAGES.items():
            rows = run_stage(folder / f"{name}.jsonl", stage, settings, rows, run)
    return rows


# problem: its place among those of its split
PUBLISHED = ("split", "problem", "answer", "branches", "labels")


def lay_out(published: Path, settings: Settings, todo: list[dict], folder: Path) -> list[dict]:
    """Labels that were published, rows of PUBLISHED, as stages of a folder, so that the SLM's readings alone
    are left to make; the problems that they are of. ValueError for rows that are of none of those to do, and
    for a folder that holds other labels."""
    rows, known = read_rows(published), {split: [row for row in todo if row["split"] == split]
                                         for split in SIZES}
    if not rows:
        raise ValueError(f"--published {published}: expected rows of labels, found none")
    for number, row in enumerate(rows, 1):
        if missing := set(PUBLISHED) - row.keys():
            raise ValueError(f"--published {published}: row {number} has no {min(missing)}: expected "
                             f"{', '.join(PUBLISHED)}")
        if len(row["labels"]) != len(row["answer"]):
            raise ValueError(f"--published {published}: row {number} has {len(row['labels'])} labels of "
                             f"{len(row['answer'])} tokens: expected one each")
        if row["split"] not in known or not 0 <= row["problem"] < len(known[row["split"]]):
            raise ValueError(f"--published {published}: row {number} is of {row['split']} problem "
                             f"{row['problem']}: expected one of the problems that are labelled")
    chosen = [known[row["split"]][row["problem"]] for row in rows]
    check_folder(folder, settings, chosen)
    *_, tokenizer, _ = settings.load()
    prompts = rstitch.unpadded(*settings.encode(tokenizer, *(problem["question"] for problem in chosen)))
    stages = {"answers": [{**problem, "prompt": prompt, "answer": row["answer"]}
                          for problem, prompt, row in zip(chosen, prompts, rows)],
              **{name: [{name: row[name]} for row in rows] for name in ("branches", "labels")}}
    there = {name: read_rows(path) for name in stages if (path := folder / f"{name}.jsonl").exists()}
    for name, old in there.items():
        if old != stages[name]:
            raise ValueError(f"--out {folder} holds other {name} than --published {published}: take another "
                             "folder")
    for name in stages.keys() - there.keys():
        if rank() == 0:
            write_rows(folder / f"{name}.jsonl", stages[name])
    return chosen


def pocket_problems(n: int, seed: int = 0) -> list[dict]:
    """Problems that the pair never saw: n of router-train, and of the other splits their share."""
    return [{"question": question(p), "split": split} for split, share in SIZES.items()
            for p in problems(split, round(n * share), seed)]


def file_problems(path: Path) -> list[dict]:
    """Questions of a JSONL file, in the order of the splits."""
    rows = [{"question": row["question"], "split": split_of(row)} for row in read_problems(path, "question")]
    return sorted(rows, key=lambda row: list(SIZES).index(row["split"]))


def problems_of(settings: Settings, path: Path | None, n: int | None) -> list[dict]:
    """Those of a file, else of the pocket domain. ValueError for options that do not go together."""
    if path and n is not None:
        raise ValueError(f"--n {n} is of the pocket domain: --problems {path} has its own number of problems")
    if path and settings.judge == "statement":
        raise ValueError("--judge statement reads the pocket domain only: expected answer, or a model, for "
                         f"--problems {path}")
    if n is not None:
        rstitch.check_count("--n", n)
    return file_problems(path) if path else pocket_problems(2000 if n is None else n)


# ---- figures ----------------------------------------------------------------------------------------------


LETTERS = {"I": "identical", "N": "neutral", "D": "divergent", "U": "unjudged"}


def quotient(a: np.ndarray, n_a: np.ndarray, b: np.ndarray, n_b: np.ndarray) -> float:
    """Ratio of two means, from sums and counts per problem."""
    return float(a.sum() / n_a.sum() / (b.sum() / n_b.sum())) if n_a.sum() and b.sum() else float("nan")


def figures(settings: Settings, rows: list[dict]) -> dict:
    """Shares of the labels and SLM entropies of labelled rows, intervals over problems; by kind of token and
    by place."""
    *_, tokenizer, eos = settings.load()
    decode, tokens = decoder(tokenizer), []
    for i, row in enumerate(rows):
        starts = sentences(decode, row["answer"], eos) + [len(row["answer"])]
        where = [(t - a) / (b - a) for a, b in zip(starts, starts[1:]) for t in range(a, b)]
        tokens += [(i, letter, H, kind_of(decode([token])), int(10 * t / len(row["answer"])),
                    int(10 * inside))
                   for t, (letter, H, token, inside) in enumerate(zip(row["labels"], row["entropy"],
                                                                      row["answer"], where))]
    problem, letter, H, kind, decile, inside = (np.array(column) for column in zip(*tokens))
    per_problem = lambda mask, weight=None: np.bincount(problem[mask], None if weight is None
                                                        else weight[mask], minlength=len(rows))  # noqa: E731
    total = per_problem(np.ones(len(H), bool))
    shares = {name: [float((letter == c).mean()), *bootstrap(ratio_of_means, per_problem(letter == c), total)]
              for c, name in LETTERS.items()}
    divergent, other = letter == "D", (letter == "I") | (letter == "N")
    sums = [per_problem(divergent, H), per_problem(divergent), per_problem(other, H), per_problem(other)]
    table = lambda key: {str(value): {"n": int((key == value).sum()),
                                      "entropy": float(H[key == value].mean()),  # noqa: E731
                                      **{name: float((letter[key == value] == c).mean())
                                         for c, name in LETTERS.items()}} for value in np.unique(key)}
    return {"problems": len(rows), "tokens": len(H), "shares": shares,
            "entropy_nats": {name: float(H[letter == c].mean()) if (letter == c).any() else None
                             for c, name in LETTERS.items()},
            "entropy_ratio": [quotient(*sums), *bootstrap(quotient, *sums)], "kind": table(kind),
            "decile of the answer": table(decile), "decile of the sentence": table(inside)}


def show(row: dict) -> str:
    lines = [f"{row['problems']} problems, {row['tokens']} tokens; intervals 95 %, over problems"]
    for name in LETTERS.values():
        share, low, high = (100 * x for x in row["shares"][name])
        H = row["entropy_nats"][name]
        lines.append(f"{name:10} {share:6.2f} % [{low:.2f}, {high:.2f}]"
                     + (f"   paper {100 * PAPER_LABELS[name]:.0f} %" if name in PAPER_LABELS else " " * 12)
                     + (f"   mean SLM entropy {H:.3f} nats" if H is not None else ""))
    lines.append("SLM entropy of divergent over identical and neutral tokens: {:.1f} x [{:.1f}, {:.1f}]   "
                 "paper 3.8 x".format(*row["entropy_ratio"]))
    for what in ("kind", "decile of the answer", "decile of the sentence"):
        lines.append(f"{what:24} {'tokens':>8} {'identical':>10} {'neutral':>9} {'divergent':>10} "
                     f"{'unjudged':>9}   entropy, nats")
        lines += [f"{value:>24} {r['n']:>8} " + " ".join(f"{100 * r[name]:>{w}.1f}"
                                                         for name, w in zip(LETTERS.values(), (10, 9, 10, 9)))
                  + f"   {r['entropy']:.3f}"
                  for value, r in row[what].items()]
    return "\n".join(lines)


def sample(settings: Settings, rows: list[dict], n: int, seed: int) -> list[dict]:
    """n judged positions at random, as a person would check them."""
    everything = [(i, t, case) for i, row in enumerate(rows) for t, case in cases_of(settings, row).items()
                  if row["labels"][t] in "ND"]
    picks = np.random.default_rng(seed).choice(len(everything), min(n, len(everything)), replace=False)
    return [{"t": t, "label": rows[i]["labels"][t], **case._asdict()}
            for i, t, case in (everything[k] for k in sorted(picks))]


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, Settings)
    add = parser.add_argument
    add("--problems", type=Path, 
        help="JSONL file of questions, or a data set as REPO:CONFIG:PART (default: the pocket domain)")
    add("--n", type=int,
        help="router-train problems of the pocket domain, and of the other splits a share (default: 2000)")
    add("--out", type=Path, help=f"folder of the stages (default, pocket domain only: {FOLDER})")
    add("--published", type=Path, metavar="FILE",
        help="labels that others made of these problems with these options, rows {split, problem, answer, "
             "branches, labels}: only the SLM's readings are made")
    add("--workers", type=int, default=1, help="processes, on a CPU (default: %(default)s)")
    add("--report", action="store_true",
        help="figures of the router-train labels, into labels.json of --results")
    add("--results", type=Path,
        help=f"folder of the figures (default: {RESULTS} for the pocket domain, else that of the stages)")
    add("--sample", type=int, metavar="N",
        help="print N judged positions of the router-train labels at random, as JSON, to check by hand")
    add("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    args = parser.parse_args()
    try:
        settings = Settings(**given(args, Settings))
        rstitch.check_count("--workers", args.workers)
        todo, folder = problems_of(settings, args.problems, args.n), args.out or FOLDER
        if args.problems and not args.out:
            raise ValueError("--out is missing: expected a folder for the labels of --problems")
        if args.published:
            todo = lay_out(args.published, settings, todo, folder)
        rows = make_labels(settings, todo, folder, args.workers)
        if rank():
            return
        train = [row for row in rows if row["split"] == "router-train"]
        if args.sample:
            print(*map(json.dumps, sample(settings, train, args.sample, args.seed)), sep="\n")
        if args.report:
            row = figures(settings, train) | {"slm": Path(settings.slm).name,
                                              "llm": Path(settings.llm).name} | provenance(args.seed,
                                                                                           len(train),
                                                                                           settings.device,
                                                                                           settings.dtype)
            target = args.results or (folder if args.problems else RESULTS)
            target.mkdir(parents=True, exist_ok=True)
            (target / "labels.json").write_text(json.dumps(row) + "\n")
            print(show(row))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    start(main, shared=True)
