"""Where a row comes from: command, seed, versions, commit; and the machine."""
import multiprocessing
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
import transformers

ANALYSIS = Path(__file__).parent.parent


def processor() -> str:
    """The processor's name and what it can do with bfloat16: rounding depends on both."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    about = dict(line.split("\t: ", 1) for line in reversed(lines) if "\t: " in line)
    name = about.get("model name\t", about.get("model name", platform.processor()))
    found = [flag for flag in ("avx512_bf16", "amx_bf16")
             if flag in about.get("flags\t", about.get("flags", "")).split()]
    return f"{name} ({', '.join(found) or 'no bfloat16 instructions'})"


def machine(device: str) -> str:
    """Of rows that hang on rounding: the processor, or the GPU's name."""
    cuda = torch.device(device).type == "cuda"
    return torch.cuda.get_device_name(device) if cuda else processor()


def commit() -> str | None:
    """The commit of this code, "+dirty" where files differ from it; None outside of git. A worker takes it
    over from `make_pool`."""
    if multiprocessing.parent_process() is not None:
        return os.environ.get("RSTITCH_COMMIT")
    git = lambda *args: subprocess.run(["git", *args], capture_output=True, text=True,
                                       cwd=ANALYSIS).stdout.strip()  # noqa: E731
    head = git("rev-parse", "--short", "HEAD")
    return head + ("+dirty" if git("status", "--porcelain", "-uno", "--", "*.py") else "") if head else None


COMMIT = commit()  # when the code was read: a run that takes an hour may see another HEAD at its end


def provenance(seed: int, n: int, device: str = "cpu", dtype: str = "float32") -> dict:
    """What every row of results carries."""
    spec = sys.modules["__main__"].__spec__
    command = " ".join(["python", *(["-m", spec.name] if spec else [Path(sys.argv[0]).name]), *sys.argv[1:]])
    return {"source": "measured", "command": command, "seed": seed, "n": n, "device": device, "dtype": dtype,
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__,
            "commit": COMMIT}
