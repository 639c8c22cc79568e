"""The processes that torchrun started: which one this is, and how they stay of one mind.

Ranks that hold parts of one model must not decide apart: a rounding difference would let one of them ask the
LLM where another goes on with the SLM, and both would wait for good. So rank 0 decides.
"""
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def meet() -> None:
    """Wait until every rank is here."""
    if world() > 1:
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=30))  # one rank may have far more to do
        dist.barrier()


def is_split(model) -> bool:
    """Do the ranks hold parts of this model?"""
    return any(hasattr(p, "full_tensor") for p in model.parameters())


def of_rank_zero(values: torch.Tensor) -> torch.Tensor:
    """Rank 0's values in place of each rank's own."""
    dist.broadcast(values, 0)
    return values


def decided_by_rank_zero(stop: Callable[..., bool], device) -> Callable[..., bool]:
    """A function whose answer on rank 0 counts on every rank: it may go by a clock."""
    return lambda *args: bool(of_rank_zero(torch.tensor(bool(stop(*args)), device=device)))


def begin() -> None:
    """Of every rank: "cuda" is its own GPU, and what all would print is printed once, by the first; a crash
    is told all the same."""
    if world() > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if rank():
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)


def end() -> None:
    """Take leave of the other ranks: a process that exits while their connections are open may be aborted."""
    if dist.is_initialized():
        dist.destroy_process_group()


def check_alone(what: str) -> None:
    """ValueError under torchrun for what one process does."""
    if world() > 1:
        raise ValueError(f"{what} is for one process, {world()} were started")


def start(main: Callable[[], object], shared: bool = False) -> None:
    """Run a module's main; under torchrun what is not shared work is refused. Ctrl-C ends it with a line."""
    begin()
    spec = sys.modules["__main__"].__spec__
    if not shared:
        try:
            check_alone(f"python -m {spec.name}" if spec else sys.argv[0])
        except ValueError as error:
            sys.exit(str(error))
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; what was written stays", file=sys.stderr)
        sys.exit(130)
    finally:
        end()
