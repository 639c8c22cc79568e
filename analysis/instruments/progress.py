"""How far a long piece of work is: a bar on a terminal, lines in a log file."""
import sys
from collections.abc import Iterator, Sequence

from tqdm import tqdm


class Lines:
    """A stream for a progress bar in a log file: each state of the bar on a line of its own."""

    def write(self, text: str) -> None:
        text = text.strip()
        if text:
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()


def progress(total: int, label: str = "", unit: str = "it", **options) -> tqdm:
    """A bar on a terminal; elsewhere a line every half a minute. Call update(0) often, so that it can tell
    the time."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=label, unit=unit, miniters=0, **options)
    return tqdm(total=total, desc=label, unit=unit, miniters=0, mininterval=30, file=Lines(),
                bar_format="{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left{postfix}",
                **options)


def tracked(items: Sequence, label: str = "", unit: str = "it", **options) -> Iterator:
    """The items, one after the other, and how many of them are done."""
    with progress(len(items), label, unit, **options) as bar:
        for item in items:
            bar.update(0)
            yield item
            bar.update()
