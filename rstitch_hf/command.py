"""The command `python rstitch.py`: one question, answered by a pair, coloured by who wrote each token."""
import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from rstitch import (
    LLM,
    SLM,
    CachedLM,
    Call,
    EntropyRouter,
    LLMOnly,
    PolicyRouter,
    R2RRouter,
    RandomRouter,
    Sampling,
    SLMOnly,
    Step,
    Stitched,
    check_count,
    count_switches,
    made_of,
    stitch,
)
from rstitch_hf.loading import check_question, encode, load_pair
from rstitch_hf.ranks import begin, check_alone, end, world
from rstitch_hf.serving import device_of

POCKET = Path(__file__).parent.parent / "analysis" / "pocket" / "models"
PROBLEM = ("Ann has 596 coins. First Ann ends up with 7 times as many. Finally Ann loses 120. "
           "How many coins does Ann have?")
COLOURS = {SLM: "\033[36m", LLM: "\033[33m", "discarded": "\033[2;9m", "plain": "\033[0m"}


class Printer:
    """Prints tokens as they are written: coloured by writer and with discarded ones struck through on a
    terminal, plain elsewhere."""

    def __init__(self, tokenizer, out=None):
        self.tokenizer = tokenizer
        self.out = sys.stdout if out is None else out
        self.colour = self.out.isatty() and "NO_COLOR" not in os.environ
        self.ids: list[int] = []
        self.start = self.shown = 0  # ids[start:shown] is on the screen and decides how the next piece reads
        if self.colour:
            print(" ".join(f"{COLOURS[k]}{name}{COLOURS['plain']}"
                           for k, name in ((SLM, "SLM"), (LLM, "LLM"), ("discarded", "discarded"))),
                  file=self.out)

    def __call__(self, row: int, call: Call) -> None:
        ids = self.ids[self.start:] + [call.token]
        before = self.tokenizer.decode(self.ids[self.start:self.shown], skip_special_tokens=True)
        piece = self.tokenizer.decode(ids, skip_special_tokens=True)[len(before):]
        whole = not piece.endswith("\ufffd")  # a character may span tokens: wait for the rest of it
        if call.kept:
            self.ids.append(call.token)
            if whole and piece:
                self.start, self.shown = self.shown, len(self.ids)
        if whole and (call.kept or self.colour):
            style = COLOURS[call.model] + ("" if call.kept else COLOURS["discarded"])
            self.out.write(f"{style}{piece}{COLOURS['plain']}" if self.colour else piece)
            self.out.flush()


class Timed:
    """A router, and the seconds that its decisions took."""

    def __init__(self, router, device: torch.device):
        self.router, self.device, self.seconds, self.decisions = router, device, 0.0, 0
        self.first, self.window = getattr(router, "first", SLM), getattr(router, "window", 1)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def leave_slm(self, step: Step) -> torch.Tensor:
        start = self.now()
        leave = self.router.leave_slm(step)
        self.seconds, self.decisions = self.seconds + self.now() - start, self.decisions + 1
        return leave

    def leave_llm(self, step: Step) -> torch.Tensor:
        return self.router.leave_llm(step)


def run_question(slm, llm, tokenizer, ids: torch.Tensor, router, **options) -> Stitched:
    """Answer one prompt (1, P), printing the answer as it is written, and a line of figures."""
    timed = Timed(router, device_of(llm))
    start = time.perf_counter()
    result = stitch(slm, llm, ids, timed, on_token=Printer(tokenizer), **options)
    seconds, calls, written = time.perf_counter() - start, result.calls[0], result.source.numel()
    net = (f", router's net {1e3 * timed.seconds / max(1, timed.decisions):.2f} ms a decision, "
           f"{100 * timed.seconds / seconds:.1f} % of the time"
           if isinstance(router, (R2RRouter, PolicyRouter)) else "")
    print(f"\n{written} tokens (LLM {100 * (result.source == LLM).float().mean():.1f} %), "
          f"{count_switches(calls)} switches, {seconds:.2f} s, {written / seconds:.0f} tokens/s{net}")
    return result


def unknown_words(tokenizer, text: str) -> list[str]:
    """The words of a text that its tokenizer has no token for; none where it knows every byte, as those
    without an unknown token do."""
    if not tokenizer.is_fast or tokenizer.unk_token_id is None:
        return []
    words = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    return [text[a:b].strip() for i, (a, b) in zip(words.input_ids, words.offset_mapping)
            if i == tokenizer.unk_token_id]


def usable_device(name: str) -> str:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):  # no such device, or no such device here
        raise argparse.ArgumentTypeError(f"{name!r} is no device that torch can use here") from None
    return name


def device_or_auto(name: str) -> str:
    return name if name == "auto" else usable_device(name)


def template_option(text: str) -> tuple[str, object]:
    """("enable_thinking", False) of "enable_thinking=false": the value as JSON where it is JSON, else as a
    text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r}: expected KEY=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


CHECKPOINTS = {"r2r": POCKET / "r2r", "plus": POCKET / "policies" / "kappa0.35-seed0"}  # of the pocket pair
TRAINED_BY = {"r2r": "analysis.train_r2r", "plus": "analysis.train_policy"}


BELONGS = {  # options to the routers that read them
    "tau": ("entropy",), "tau_back": ("entropy",), "window": ("entropy",), "p": ("random",),
    "threshold": ("r2r", "plus"), "checkpoint": ("r2r", "plus")}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(
        "Answer a question with a small and a large language model, stitched token by token. Decoding is "
        "greedy unless --temperature says otherwise, whatever sampling a checkpoint asks for by default."))
    add = parser.add_argument
    add("question", nargs="?", help="the problem to solve (default: a built-in one)")
    add("--slm", default=str(POCKET / "slm"), help="small model: a Hugging Face name, a folder (an adapter's "
        "too), FILE.gguf or REPO:FILE.gguf (default: the pocket pair's)")
    add("--llm", default=str(POCKET / "llm"), help="large model with the same tokenizer (default: the pocket "
        "pair's)")
    add("--router", choices=["entropy", "r2r", "plus", "slm", "llm", "random"], default="entropy",
        help="who decides which model writes: R-Stitch, R2R, R-Stitch+, one model alone, chance (default: "
        "%(default)s)")
    add("--tau", type=float, help="entropy threshold of --router entropy, in [0, 1]: entropy in nats divided "
        "by log V (default: 0.02)")
    add("--tau-back", type=float, help="its own threshold for the LLM to hand back (default: tau)")
    add("--window", type=int, help="kept tokens over which --router entropy takes the mean (default: 1)")
    add("--p", type=float, help="probability per token, in [0, 1], that --router random calls the LLM "
        "(default: 0.1)")
    add("--checkpoint", type=Path, metavar="FOLDER", help="trained router of --router r2r or plus (default: "
        "the pocket pair's, for that pair)")
    add("--threshold", type=float, help="score in [0, 1] from which --router r2r or plus calls the LLM "
        "(default: as trained)")
    add("--system", help="the system's message (default: the chat template's own)")
    add("--instruction", help="a line to add behind the question, such as how to mark the answer")
    add("--template", metavar="KEY=VALUE", type=template_option, action="append", default=[],
        help="option of the chat template, such as enable_thinking=false; may be repeated")
    add("--max-new-tokens", type=int, default=1024, help="longest answer, in tokens (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="of sampling; 0 is greedy (default: %(default)s)")
    add("--top-k", type=int, default=0, help="tokens to sample from, 0 for all; needs --temperature "
        "(default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="probability mass to sample from, in (0, 1]; needs "
        "--temperature (default: %(default)s)")
    add("--seed", type=int, default=0, help="integer that decides every random draw (default: %(default)s)")
    add("--device", type=device_or_auto, default="cuda" if torch.cuda.is_available() else "cpu",
        help="torch device of both models; auto lets accelerate spread each over GPUs, memory and disk "
             "(default: %(default)s)")
    add("--tp", action="store_true", help="split the LLM over the processes of torchrun --nproc-per-node N "
        "rstitch.py --tp ...; each holds the whole SLM")
    add("--graphs", action="store_true", help="replay steps as CUDA graphs; needs a CUDA device")
    add("--special-tokens-may-differ", action="store_true", help="run a pair whose tokenizers differ in "
        "special tokens only")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="of both models; auto is the "
        "checkpoint's (default: float32 on a CPU, else auto)")
    return parser


def checkpoint_of(args: argparse.Namespace) -> Path:
    """The folder of a trained router; ValueError where there is none, saying how to train one."""
    pocket = (args.slm, args.llm) == (str(POCKET / "slm"), str(POCKET / "llm"))
    if args.checkpoint is None and not pocket:
        raise ValueError(f"--router {args.router} needs --checkpoint FOLDER for this pair: train one with "
                         f"python -m {TRAINED_BY[args.router]} --slm {args.slm} --llm {args.llm} --problems "
                         "FILE")
    return args.checkpoint or CHECKPOINTS[args.router]


def check_options(args: argparse.Namespace) -> None:
    """ValueError for what can be seen to be wrong, or would be ignored, before a model is loaded."""
    for option, routers in BELONGS.items():
        if getattr(args, option) is not None and args.router not in routers:
            raise ValueError(f"--{option.replace('_', '-')} {getattr(args, option)} belongs to --router "
                             f"{' or '.join(routers)}, not to --router {args.router}")
    for option, default in (("top_k", 0), ("top_p", 1.0)):
        if getattr(args, option) != default and not args.temperature:
            raise ValueError(f"--{option.replace('_', '-')} {getattr(args, option)} needs a --temperature "
                             "above 0")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold}: expected a score in [0, 1]")
    if args.tp and world() == 1:
        raise ValueError("--tp splits the LLM over several processes: expected torchrun --nproc-per-node N "
                         "rstitch.py --tp ...")
    own = "cuda" if torch.cuda.is_available() else "cpu"
    if args.tp and (args.graphs or args.device != own):
        raise ValueError(f"--tp with --device {args.device}{' --graphs' * args.graphs}: expected --device "
                         f"{own}, of which each process takes its own, and no graphs")
    if not args.tp:
        check_alone("python rstitch.py without --tp")
    check_count("--max-new-tokens", args.max_new_tokens)
    Sampling(args.temperature, args.top_k, args.top_p)
    check_question(args.question)
    if args.router in CHECKPOINTS:
        made_of(checkpoint_of(args))
    else:
        build_router(args)


def build_router(args: argparse.Namespace, slm=None, llm=None):
    """The router that the command line names; a trained one needs the models. ValueError for a threshold or
    the like that is none."""
    given = {option: getattr(args, option) for option, routers in BELONGS.items()
             if args.router in routers and getattr(args, option) is not None}
    given.pop("checkpoint", None)
    return {"entropy": lambda: EntropyRouter(**given), "slm": SLMOnly, "llm": LLMOnly,
            "random": lambda: RandomRouter(**{"p": 0.1} | given, seed=args.seed),
            "r2r": lambda: R2RRouter.load(checkpoint_of(args), slm, llm, **given),
            "plus": lambda: PolicyRouter.load(checkpoint_of(args), slm, llm, **given)}[args.router]()


@contextmanager
def threads_for(model) -> Iterator[None]:
    """One CPU thread for a model that gains nothing by more and crawls where another process wants a core; as
    before afterwards."""
    before = torch.get_num_threads()
    try:
        if sum(p.numel() for p in model.parameters()) < 1e8:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


def answer(args: argparse.Namespace) -> None:
    """Load the pair, answer the question."""
    dtype = args.dtype or ("float32" if args.device == "cpu" else "auto")
    *models, tokenizer = load_pair(args.slm, args.llm, args.device, dtype, args.special_tokens_may_differ,
                                   args.tp)
    router = build_router(args, *models)
    ids, _ = encode(tokenizer, args.question, system=args.system, instruction=args.instruction,
                    **dict(args.template))
    if unknown := unknown_words(tokenizer, args.question):
        print(f"note: unknown to the tokenizer: {' '.join(unknown)}", file=sys.stderr)
    with threads_for(models[1]):
        if args.graphs:
            models = [CachedLM(model, 1, ids.shape[1] + args.max_new_tokens, graphs=True) for model in models]
        run_question(*models, tokenizer, ids, router, max_new_tokens=args.max_new_tokens,
                     temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)


def fill_in(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """The built-in problem where no question is given; of the pocket pair, at a tau that suits it."""
    if args.question is not None:
        return
    args.question = PROBLEM
    pocket = all(getattr(args, name) == parser.get_default(name) for name in ("slm", "llm"))
    if pocket and args.router == "entropy" and args.tau is None:
        args.tau = 0.005
        print(f'python rstitch.py --tau {args.tau} "{PROBLEM}"\n')


def main(argv: Sequence[str] | None = None) -> None:
    begin()
    parser = build_parser()
    args = parser.parse_args(argv)
    built_in = args.question is None
    try:
        fill_in(args, parser)
        check_options(args)
        answer(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports Ctrl-C; what was written stands on the screen
    finally:
        end()
    if built_in:
        print("\nEvery method on 200 problems, in a table, two minutes: python -m analysis.demo")
