"""How far a long piece of work is: a bar on a terminal, lines in a log file."""
import multiprocessing
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from tqdm import tqdm

LINE = 30.0  # seconds between two lines of a log file


class Lines:
    """A stream for a progress bar in a log file: each state of the bar on a line of its own."""

    def write(self, text: str) -> None:
        text = text.strip()
        if text:
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()


def progress(total: int, label: str = "", unit: str = "it", inner: bool = False, **options) -> tqdm:
    """A bar on a terminal; elsewhere a line every half a minute, whatever the work is busy with.

    An inner one, of a step of longer work, shows after half a minute and goes when it ends. A worker process
    has none: its parent tells."""
    if multiprocessing.parent_process() is not None:
        return tqdm(disable=True)
    options |= {"total": total, "desc": label, "unit": unit, "miniters": 0}
    if inner:
        options |= {"delay": LINE, "leave": False}
    if not sys.stderr.isatty():
        # The mean pace from the beginning: a line that tells but the time would spoil one of the last lines.
        # Position 0: an inner bar would move the cursor to a line of its own.
        options |= {"file": Lines(), "position": 0, "mininterval": LINE, "smoothing": 0, "bar_format":
                    "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left{postfix}"}
    bar = tqdm(**options)
    threading.Thread(target=keep_telling, args=(bar,), daemon=True).start()
    return bar


def keep_telling(bar: tqdm, pause: float = 1.0) -> None:
    """Show the time that passes while nothing is counted, until the bar is closed."""
    while not bar.disable:
        time.sleep(pause)
        elapsed = bar.format_dict["elapsed"]
        if elapsed >= bar.delay and bar.start_t + elapsed - bar.last_print_t >= max(bar.mininterval, pause):
            bar.last_print_t = bar.start_t + elapsed
            bar.refresh()


def tracked(items: Sequence, label: str = "", unit: str = "it", **options) -> Iterator:
    """The items, one after the other, and how many of them are done."""
    with progress(len(items), label, unit, **options) as bar:
        for item in items:
            yield item
            bar.update()
