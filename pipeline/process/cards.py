"""Assign one GPU to each run of a worker."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.process.environment import home
from pipeline.process.lock import hold_if_free

VISIBLE = "CUDA_VISIBLE_DEVICES"
PAUSE = 5.0
"""Seconds between two checks for a free GPU."""


def cards() -> list[str]:
    """The GPUs that this process may use, as in `CUDA_VISIBLE_DEVICES`; empty if there is no GPU."""
    if (visible := os.environ.get(VISIBLE)) is not None:
        return [name for name in visible.split(",") if name not in ("", "-1")]
    try:
        found = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    except OSError:
        return []
    return [str(number) for number, line in enumerate(found.stdout.splitlines()) if line.startswith("GPU ")]


@contextmanager
def one_card() -> Iterator[None]:
    """Reserve one GPU among all runs of this user's workers while the block runs; wait if all GPUs are in use.

    Call before torch is imported. Without GPUs, nothing happens.
    """
    names = cards()
    held = None
    while names and not held:
        for name in names:
            if held := hold_if_free(_lock(name)):
                break
        else:
            time.sleep(PAUSE)
    if held is None:
        yield
        return
    before = os.environ.get(VISIBLE)
    os.environ[VISIBLE] = name
    try:
        with held:
            yield
    finally:
        if before is None:
            del os.environ[VISIBLE]
        else:
            os.environ[VISIBLE] = before


def _lock(card: str) -> Path:
    return home() / "cards" / f"{socket.gethostname()}-{card.replace('/', '-')}.lock"  # hosts may share a home


if __name__ == "__main__":
    print(max(1, len(cards())))  # number of runs that a worker takes at once
