"""End the processes that a killed run leaves behind.

A step notices that the flow or DVC that runs it has ended. Prefect's temporary server does not: the flow stops it,
unless the flow gets SIGKILL.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator

import psutil

from pipeline.process.signals import GRACE, PARENT, identity


def leave_none() -> None:
    """Fork a watcher that ends the remaining child processes when this process has ended or was killed.

    It waits for as long as a step may take to end, then sends them SIGTERM, and later SIGKILL. Call before threads are
    started. Without `os.fork`, nothing happens.
    """
    if not hasattr(os, "fork"):
        return
    run = os.getpid()
    word = os.environ[PARENT] = identity(psutil.Process())  # child processes inherit it and are found by it
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork():
        return
    try:
        _wait(run, word)
    finally:
        os._exit(0)


def _wait(run: int, word: str) -> None:
    os.setsid()  # signals from the terminal must not reach this process
    os.chdir("/")
    with open(os.devnull, "r+b") as nothing:  # readers of the run's output must not wait for this process
        for number in range(3):
            os.dup2(nothing.fileno(), number)
    os.closerange(3, 256)
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, signal.SIG_IGN)
    while os.getppid() == run:
        time.sleep(0.5)
    end = time.monotonic()
    while left := list(_started_by(word)):
        waited = time.monotonic() - end
        for process in left:
            with contextlib.suppress(psutil.Error):
                if waited > 2.5 * GRACE:
                    process.kill()
                elif waited > 1.5 * GRACE:
                    process.terminate()
        time.sleep(0.5)


def _started_by(word: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if (
                process.pid != os.getpid()
                and process.environ().get(PARENT) == word
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                yield process
