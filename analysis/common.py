"""What the analyses share: the pocket pair, options, processes, checkpoints, and rows of results with provenance."""
import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import field, fields
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import rstitch
from rstitch_hf.command import template_option, usable_device
from rstitch import fingerprint  # noqa: F401
from analysis.stats import auroc, bootstrap, ratio_of_means, read_rows, wilson  # noqa: F401  (one place to import from)

MODELS = Path(__file__).parent / "models"
RESULTS = Path(__file__).parent / "results"
MAX_NEW_TOKENS = 320  # the longest of 20,000 fully worked-out solutions takes 226


def load_pocket(slm: str = "slm", llm: str = "llm", device: str = "cpu", dtype: str = "float32"):
    """(SLM, LLM, tokenizer) of the pocket pair; `llm="llm-short"` is the control."""
    return rstitch.load_pair(str(MODELS / slm), str(MODELS / llm), device, dtype)


def option(default, text: str):
    """A field of a config, with its help on the command line."""
    return field(default=default, metadata={"help": text})


def add_options(parser: argparse.ArgumentParser, config, what: str = "", **others) -> None:
    """An argument for each field of a config; left out it is None. `others`: defaults of another config, to tell of beside the first."""
    for f in fields(config):
        default = f"{f.default}" * (f.default not in ("", None, ())) + "".join(f", {name} {getattr(other, f.name)}" for name, other in others.items() if getattr(other, f.name) != f.default)
        kind = {"device": dict(type=usable_device), "dtype": dict(choices=["float32", "bfloat16", "float16"]), "template": dict(type=template_option, action="append", metavar="KEY=VALUE"),
                "system": dict(type=str), "instruction": dict(type=str)}.get(
            f.name, dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type))
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=None, help=f"{what}{f.metadata['help']}" + f" (default: {default})" * bool(default), **kind)


def given(args: argparse.Namespace, config) -> dict:
    """The fields of a config that the command line names."""
    named = {f.name: getattr(args, f.name) for f in fields(config) if getattr(args, f.name) is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in named.items()}


def make_pool(workers: int, *preload: str) -> Executor:
    """Processes, or for one worker a thread of this one. A server that has imported `preload` once forks them, where there is one."""
    if workers == 1:
        return ThreadPoolExecutor(1)
    if COMMIT:
        os.environ["RSTITCH_COMMIT"] = COMMIT
    context = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
    context.set_forkserver_preload(list(preload))
    return ProcessPoolExecutor(workers, mp_context=context)


@contextmanager
def parallel_map(workers: int, *preload: str):
    """`map` over processes, in order; with one worker the plain one, in this thread (math-verify's time limits need the main thread)."""
    if workers == 1:
        yield map
    else:
        with make_pool(workers, *preload) as pool:
            yield pool.map


def completed(workers: int, jobs: dict[Hashable, tuple], *preload: str) -> Iterator[tuple]:
    """(key, result) of every job (function, *arguments), as it ends; with one worker in turn, in this thread."""
    if workers == 1:
        yield from ((key, function(*arguments)) for key, (function, *arguments) in jobs.items())
    elif jobs:
        with make_pool(workers, *preload) as pool:
            running = {pool.submit(*job): key for key, job in jobs.items()}
            yield from ((running[job], job.result()) for job in as_completed(running))


def now(device: torch.device | str = "cpu") -> float:
    """Seconds, once the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def fill(path: Path, jobs: dict[Hashable, tuple], current: Callable[[], dict], made_with: Callable[[Hashable], str], workers: int, label: str) -> dict:
    """Append to `path` the rows of those jobs whose keys current() lacks, each with what it was made with; current() afterwards."""
    have = current()
    missing = {key: job for key, job in jobs.items() if key not in have}
    for key, row in tqdm(completed(workers, missing, "__main__"), total=len(missing), desc=label, disable=None):
        append_row(path, row | {"made_with": made_with(key)})
    return current()


def processor() -> str:
    """The processor's name and what it can do with bfloat16: rounding depends on both."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    about = dict(line.split("\t: ", 1) for line in reversed(lines) if "\t: " in line)
    name = about.get("model name\t", about.get("model name", platform.processor()))
    found = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in about.get("flags\t", about.get("flags", "")).split()]
    return f"{name} ({', '.join(found) or 'no bfloat16 instructions'})"


class Lines:
    """A stream for a progress bar in a log file: each state of the bar on a line of its own."""

    def write(self, text: str) -> None:
        text = text.strip()
        if text:
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()


def progress(total: int, label: str = "", unit: str = "it", **options) -> tqdm:
    """A bar on a terminal; elsewhere a line every half a minute. Call update(0) often, so that it can tell the time."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=label, unit=unit, miniters=0, **options)
    return tqdm(total=total, desc=label, unit=unit, miniters=0, mininterval=30, file=Lines(),
                bar_format="{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left", **options)


def rotated(items: list, i: int) -> list:
    """The items, beginning with another one for each i: the order in which methods are timed on problem i."""
    return items[i % len(items):] + items[:i % len(items)]


def commit() -> str | None:
    """The commit of this code, "+dirty" where files differ from it; None outside of git. A worker takes it over from `make_pool`."""
    if multiprocessing.parent_process() is not None:
        return os.environ.get("RSTITCH_COMMIT")
    git = lambda *args: subprocess.run(["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()  # noqa: E731
    head = git("rev-parse", "--short", "HEAD")
    return head + ("+dirty" if git("status", "--porcelain", "-uno", "--", "*.py") else "") if head else None


COMMIT = commit()  # when the code was read: a run that takes an hour may see another HEAD at its end


def provenance(seed: int, n: int, device: str = "cpu", dtype: str = "float32") -> dict:
    """What every row of results carries."""
    spec = sys.modules["__main__"].__spec__
    command = " ".join(["python", *(["-m", spec.name] if spec else [Path(sys.argv[0]).name]), *sys.argv[1:]])
    return {"source": "measured", "command": command, "seed": seed, "n": n, "device": device, "dtype": dtype,
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "commit": COMMIT}


def write_rows(path: Path, rows: list[dict]) -> None:
    """Replace a file of one JSON row per line in one step."""
    path.with_suffix(".new").write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(path.with_suffix(".new"), path)


def append_row(path: Path, *rows: dict) -> None:
    """Append rows in one write. Rows read so far are written back first if the last one was torn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            torn = file.read() != b"\n"
        if torn:
            write_rows(path, read_rows(path))
    with open(path, "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def rewind(path: Path, key: str, done: int) -> None:
    """Drop the rows of a log from `done` on: those of work that was logged but killed before its checkpoint, and is done again."""
    if path.exists():
        write_rows(path, [row for row in read_rows(path) if row[key] < done])


def save_checkpoint(path: Path, model, optimizer, done: int) -> None:
    """Weights and optimizer moments in one safetensors file, replaced in one step."""
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in model.named_parameters()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": torch.as_tensor(value).clone() for key, value in state.items()}
    save_file(tensors, path.with_suffix(".new"), metadata={"done": str(done)})
    os.replace(path.with_suffix(".new"), path)


def load_checkpoint(path: Path, model, optimizer=None) -> int:
    """Restore what `save_checkpoint` wrote; what is done, 0 where there is no checkpoint. Weights only without optimizer."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        parameters, state = dict(model.named_parameters()), {}
        for key in file.keys():
            kind, name = key.split(".", 1)
            if kind == "model":
                parameters[name].data.copy_(file.get_tensor(key))
            else:
                i, moment = name.split(".")
                state.setdefault(int(i), {})[moment] = file.get_tensor(key)
        if optimizer is not None:
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(file.metadata()["done"])
