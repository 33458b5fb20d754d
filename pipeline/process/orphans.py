"""What a run that was killed leaves behind is ended.

The steps see by themselves that nobody is left that they work for. Prefect's temporary server does not: the flow stops it,
and a flow that gets SIGKILL stops nothing.
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
    """Have a process of its own wait for the end of this one, however it ends, and then for that of all that it started.

    What is still there after the time that a step has to end in order is asked to end, and then killed. Call before threads are started; where the
    system cannot fork, nothing happens.
    """
    if not hasattr(os, "fork"):
        return
    run = os.getpid()
    word = os.environ[PARENT] = identity(psutil.Process())  # which marks what is started from now on
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork():
        return
    try:
        _wait(run, word)
    finally:
        os._exit(0)


def _wait(run: int, word: str) -> None:
    os.setsid()  # signals from the terminal are not for this process
    os.chdir("/")
    with open(os.devnull, "r+b") as nothing:  # and nobody who reads the run's output is to wait for it
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
