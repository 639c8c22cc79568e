"""What the figures need models for: trajectories and interventions, a few MB in all.

    python -m analysis.collect               pocket pair
    P="--slm SMALL --llm LARGE --problems file.jsonl"
    python -m analysis.collect $P --out results
    python -m analysis.collect $P --answers answers.jsonl --wrong 60 --sampled 0 --continued 0 --out results

Rows: trajectories.jsonl, interventions.jsonl; collect.json says how they were made.
Feeds: notebooks 1 and 2.

A trajectory is the SLM's and the LLM's greedy answer to a problem, right or wrong, with entropies; the SLM's
is also sampled; with --answers the greedy ones are those of `analysis.answers`. An intervention is where the
SLM is wrong and the LLM right: from every token of the SLM's answer on the LLM goes on, greedily, to see
whether it is right in the end, and for the first problems by several sampled continuations. Where the SLM's
token is the one that the LLM would write, both places have the same continuation, and it is written once.

A file of problems holds rows {"question": ..., "answer": ...}, graded by math-verify. Both stages append a
block of problems at a time and go on after a kill with the same bytes.
"""
import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import rstitch
from analysis.answers import digest
from analysis.instruments.options import add_options, given, option
from analysis.instruments.pool import parallel_map
from analysis.instruments.problems import Stated, question, read_problems, verify
from analysis.instruments.progress import progress
from analysis.instruments.provenance import provenance
from analysis.instruments.rows import RESULTS, read_rows
from analysis.instruments.runs import run_stage, settle
from analysis.instruments.task import Pair, branches_together, common_vocab, counter, decoder, made_by
from analysis.label import read_along
from analysis.pocket.domain import problems, verify_number
from rstitch import fingerprint
from rstitch_hf.loading import left_padded
from rstitch_hf.ranks import start

N = 800


@dataclass(frozen=True)
class Settings(Pair):
    """How the files are made; the problems apart, all follows from it."""

    temperature: float = option(0.6, "of sampled answers and continuations")
    samples: int = option(8, "sampled answers of the SLM to each of the first --sampled problems")
    sampled: int = option(200, "problems with sampled answers")
    continuations: int = option(4, "sampled continuations from each token, for the first --continued "
                                   "problems with interventions")
    continued: int = option(40, "problems with sampled continuations")
    every: int = option(1, "tokens between two interventions")
    block: int = option(25, "problems worked on together")

    def __post_init__(self):
        super().__post_init__()
        for name in ("samples", "continuations", "every", "block"):
            rstitch.check_count(f"--{name.replace('_', '-')}", getattr(self, name))
        for name in ("sampled", "continued"):
            rstitch.check_count(f"--{name}", getattr(self, name), least=0)
        rstitch.Sampling(self.temperature)


def grade(text: str, row: dict, finished: bool = True) -> bool:
    """Is the final answer of the text right? The pocket domain by its last sentence, any other by
    math-verify."""
    if row["domain"] == "pocket":
        return verify_number(row["answer"], text)
    return verify(Stated(row["question"], str(row["answer"])), text, finished)


def significant(H: list[float]) -> list[float]:
    return [float(f"{h:.3g}") for h in H]


def write_on(settings: Settings, router, prompts: list[list[int]], temperature: float = 0.0,
             seeds: list[int] | None = None,
             heads: list[list[int]] | None = None) -> list[list[rstitch.Call]]:
    """The kept calls of each prompt's answer; of an answer that begins with its head, the rest."""
    slm, llm, _, eos = settings.load()
    heads = heads or [[] for _ in prompts]
    out: list[list[rstitch.Call]] = [[] for _ in prompts]
    if not prompts:
        return out
    order = branches_together(range(len(prompts)), prompts, list(map(len, heads)))
    ids, mask = left_padded([prompts[k] + heads[k] for k in order])
    room = [settings.max_new_tokens - len(heads[k]) for k in order]
    with progress(len(order), "answers of a block", inner=True) as bar:
        stitched = rstitch.stitch(slm, llm, ids, router, attention_mask=mask, max_new_tokens=room,
                                  temperature=temperature, slots=settings.rows,
                                  seed=0 if seeds is None else [seeds[k] for k in order],
                                  on_token=counter(bar, eos, room))
    for k, kept in zip(order, stitched.kept):
        out[k] = kept
    return out


def encoded(settings: Settings, rows: list[dict]) -> list[list[int]]:
    *_, tokenizer, _ = settings.load()
    return rstitch.unpadded(*settings.encode(tokenizer, *(row["question"] for row in rows)))


def trajectories(settings: Settings, rows: list[dict]) -> list[dict]:
    """Both models alone, greedy, unless they have answered; the SLM's answers sampled several times."""
    *_, tokenizer, eos = settings.load()
    decode, prompts = decoder(tokenizer), encoded(settings, rows)

    def right(calls: list[rstitch.Call], row: dict) -> int:
        return int(grade(decode([call.token for call in calls]), row, calls[-1].token in eos))

    mean = lambda calls: significant([float(np.mean([call.entropy for call in calls]))])[0]  # noqa: E731
    known = [row.get("answered") for row in rows]
    if not all(known):
        small, large = (write_on(settings, router, prompts)
                        for router in (rstitch.SLMOnly(), rstitch.LLMOnly()))
        known = [{"slm": right(s, row), "llm": right(b, row), "slm_tokens": [c.token for c in s],
                  "H": significant([c.entropy for c in s]), "llm_n": len(b), "llm_H": mean(b)}
                 for row, s, b in zip(rows, small, large)]
    drawn = [i for i, row in enumerate(rows) if row["id"] < settings.sampled for _ in range(settings.samples)]
    seeds = rstitch.row_seeds(rows[0]["id"], len(drawn)) if drawn else []
    sampled: list[list] = [[] for _ in rows]
    for i, calls in zip(drawn, write_on(settings, rstitch.SLMOnly(), [prompts[i] for i in drawn],
                                        settings.temperature, seeds) if drawn else []):
        sampled[i].append([right(calls, rows[i]), mean(calls), len(calls)])
    return [{"id": row["id"], "steps": row.get("steps"), **one, "samples": samples}
            for row, one, samples in zip(rows, known, sampled)]


def turns(settings: Settings, prompt: list[int], answer: list[int], places: list[int]) -> list[int]:
    """Those of the places in an answer of the SLM, the first aside, at which the LLM's greedy continuation is
    another one than at the place before: a token in between is not the one that it would have written."""
    pair = settings.load()
    own, _ = read_along(pair[1], prompt, answer, common_vocab(pair))
    differ = np.cumsum([0, *np.not_equal(own, answer)])  # tokens before each place at which the two differ
    return [t for before, t in zip(places, places[1:]) if differ[t] > differ[before]]


def interventions(settings: Settings, rows: list[dict]) -> list[dict]:
    """`right`: a letter per prefix of the SLM's answer, from none of it to all of it: 1 if the LLM, going on
    from there, is right in the end, 0 if not, - where it was not asked. `sampled`: how many of the sampled
    continuations are right. Empty where there is nothing to ask."""
    *_, tokenizer, eos = settings.load()
    decode, prompts = decoder(tokenizer), encoded(settings, rows)
    todo, drawn, like = [], [], {}
    for i, row in enumerate(rows):
        if row["llm"] and not row["slm"]:
            n, place = len(row["slm_tokens"]), 0
            places = [t for t in range(n) if t % settings.every == 0] + [n]
            new = {0, *turns(settings, prompts[i], row["slm_tokens"], places)}
            for t in places:
                place = t if t in new else place
                like[i, t] = i, place
            todo += [(i, t) for t in sorted(new)]
            drawn += [(i, t) for t in places
                      for _ in range(settings.continuations)] if row["asked"] < settings.continued else []

    def ends(pairs: list[tuple[int, int]], temperature: float) -> list[bool]:
        heads = [rows[i]["slm_tokens"][:t] for i, t in pairs]
        ask = [k for k, head in enumerate(heads) if not (head and head[-1] in eos)
               and len(head) < settings.max_new_tokens]
        seeds = rstitch.row_seeds(rows[0]["id"], len(pairs)) if pairs else []
        went_on = dict(zip(ask, write_on(settings, rstitch.LLMOnly(), [prompts[pairs[k][0]] for k in ask],
                                         temperature,
                                         [seeds[k] for k in ask], [heads[k] for k in ask])))
        whole = [head + [call.token for call in went_on.get(k, [])] for k, head in enumerate(heads)]
        return [grade(decode(tokens), rows[i], tokens[-1] in eos) for (i, _), tokens in zip(pairs, whole)]

    found, counts = dict(zip(todo, ends(todo, 0.0))), {}
    right = {place: found[same] for place, same in like.items()}
    for place, good in zip(drawn, ends(drawn, settings.temperature)):
        counts[place] = counts.get(place, 0) + good
    out = []
    for i, row in enumerate(rows):
        n = len(row["slm_tokens"])
        asked = row["llm"] and not row["slm"]
        out.append({"id": row["id"], "right": "".join({True: "1", False: "0", None: "-"}[right.get((i, t))]
                                                      for t in range(n + 1)) if asked else "",
                    "sampled": [counts.get((i, t)) for t in range(n + 1)] if (i, 0) in counts else [],
                    "text": [decode([t]) for t in row["slm_tokens"]] if asked else []})
    return out


def pocket_rows(n: int, seed: int) -> list[dict]:
    return [{"id": i, "question": question(p), "answer": p.answer, "steps": len(p.steps), "domain": "pocket"}
            for i, p in enumerate(problems("test", n, seed))]


def file_rows(path: Path) -> list[dict]:
    return [{"id": i, "question": row["question"], "answer": row["answer"], "domain": "file"}
            for i, row in enumerate(read_problems(path, "question", "answer"))]


def answered(settings: Settings, rows: list[dict], path: Path, wrong: int | None) -> list[dict]:
    """The problems that both models have answered in a file of `analysis.answers`, with their greedy answers,
    as far as the one that is the `wrong`-th which the LLM alone gets right. ValueError where there is none
    that this pair made."""
    made, have = made_by(settings) | {"what": "answer", "temperature": 0.0}, {}
    for one in read_rows(path):
        if all(one.get(name) == value for name, value in made.items()):
            have.setdefault((one["method"], one["question"]), one)
    out, alone = [], 0
    for row in rows:
        small, large = (have.get((name, digest(Stated(row["question"], "")))) for name in ("slm", "llm"))
        if small and large and alone != wrong:
            alone += large["correct"] and not small["correct"]
            mean = significant([float(np.mean(large["entropy"]))])[0]
            out.append({**row, "answered": {
                "slm": int(small["correct"]), "llm": int(large["correct"]), "slm_tokens": small["tokens"],
                "H": significant(small["entropy"]), "llm_n": len(large["tokens"]), "llm_H": mean}})
    if not out:
        raise ValueError(f"--answers {path}: expected greedy answers of slm and llm to these problems, by "
                         "this pair, with this dtype, --max-new-tokens and prompt; found none to one problem")
    return out


def collect(settings: Settings, rows: list[dict], out: Path, workers: int = 1, seed: int = 0) -> list[dict]:
    """Both files; the problems with what each stage found. ValueError where `out` holds those of other
    settings or problems."""
    pair = settings.load()
    kept = settings.record() | {"slm": Path(settings.slm).name, "llm": Path(settings.llm).name}
    made = {"settings": kept, "vocab": common_vocab(pair), "slm": fingerprint(pair[0]),
            "llm": fingerprint(pair[1])}
    first = partial(provenance, seed, len(rows), settings.device, settings.dtype)
    known = settle(out, made, "files", "collect.json", first)
    if (known["n"], known["seed"]) != (len(rows), seed):
        raise ValueError(f"--out {out} holds files of {known['n']} problems of seed {known['seed']}, not of "
                         f"{len(rows)} of seed {seed}; take another folder")

    with parallel_map(workers, __name__) as run:
        found = run_stage(out / "trajectories.jsonl", trajectories, settings, rows, run)
        asked = np.cumsum([bool(row["llm"] and not row["slm"]) for row in found])
        return run_stage(out / "interventions.jsonl", interventions, settings,
                         [row | {"asked": int(k) - 1} for row, k in zip(found, asked)], run)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, Settings)
    add = parser.add_argument
    add("--problems", type=Path, help="JSONL file of problems, or a data set as REPO:CONFIG:PART (default: "
        "the pocket domain's test split)")
    add("--n", type=int, help=f"problems of the pocket domain (default: {N})")
    add("--seed", type=int, default=0, help="of the pocket problems (default: %(default)s)")
    add("--answers", type=Path, help="greedy answers of both models to --problems, a file of "
        "analysis.answers: problems that both have answered are taken, and not answered again")
    add("--wrong", type=int, help="--answers: as many problems as give so many interventions (default: all)")
    add("--out", type=Path, help=f"folder of the files (default, pocket domain only: {RESULTS})")
    add("--workers", type=int, default=1, help="processes, on a CPU (default: %(default)s)")
    args = parser.parse_args()
    try:
        settings = Settings(**given(args, Settings))
        rstitch.check_count("--workers", args.workers)
        if args.problems and args.n is not None:
            raise ValueError(f"--n {args.n} is of the pocket domain: --problems {args.problems} has its own "
                             "number of problems")
        rstitch.check_count("--n", N if args.n is None else args.n)
        rows = file_rows(args.problems) if args.problems else pocket_rows(N if args.n is None else args.n,
                                                                          args.seed)
        if args.problems and not args.out:
            raise ValueError("--out is missing: expected a folder for the files of --problems")
        if args.answers:
            if not args.problems:
                raise ValueError(f"--answers {args.answers}: expected the --problems they answer as well")
            rstitch.check_count("--wrong", 1 if args.wrong is None else args.wrong)
            rows = answered(settings, rows, args.answers, args.wrong)
        elif args.wrong is not None:
            raise ValueError(f"--wrong {args.wrong}: expected --answers beside it, which say who is wrong")
        found = collect(settings, rows, args.out or RESULTS, args.workers, args.seed)
        print(f"{len(found)} problems, the SLM right on {sum(r['slm'] for r in found)}, the LLM on "
              f"{sum(r['llm'] for r in found)}, {sum(bool(r['right']) for r in found)} with interventions")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    start(main, shared=True)
