"""Progress bars on terminals, none in log files.

A bar is drawn only on a terminal: this process's own, or the one that a parent process lends by naming it in the
environment variable ``UNFREEZE_TTY`` (a step runs in a process whose output is piped into a log, but the person who
started the recipe still watches a terminal). Bars vanish when they end; the log's lines stay.
"""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def terminal() -> TextIO | None:
    """The terminal to draw on, or None if there is none."""
    if sys.stderr.isatty():
        return sys.stderr
    with contextlib.suppress(KeyError, OSError):
        return open(os.environ["UNFREEZE_TTY"], "w")  # tqdm keeps it open for the bar's life
    return None


def track(iterable: Iterable[T], description: str, total: int | None = None, done: int = 0) -> Iterator[T]:
    """Yield from ``iterable`` and draw a progress bar on the terminal, if there is one.

    Args:
        iterable: the items.
        description: what is going on, in a word or two.
        total: number of items, if ``iterable`` has no length.
        done: how many of them were done before.
    """
    file = terminal()
    if file is None:
        yield from iterable
        return
    yield from tqdm(
        iterable, description, total, leave=False, file=file, dynamic_ncols=True, mininterval=0.2, initial=done
    )
