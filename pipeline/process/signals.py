"""How a step ends before its time: when it is asked to, and when nobody is left that it works for."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType

import psutil

from unfreeze.persistence.interruption import Interrupted, Interruption

PARENT = "UNFREEZE_PARENT"
"""Environment variable that names the process a step works for, as `identity` writes it."""

INTERRUPTED = 130
"""Exit code of a run that was interrupted, as shells have it."""

GRACE = 20.0
"""Seconds that a process has between being asked to end and being killed."""


def stop_when_asked(interruption: Interruption) -> None:
    """Have SIGTERM and Ctrl-C end the step: a training after the batch it is at and a checkpoint, all else at once.

    A second one does not wait for the training.
    """

    def handler(number: int, frame: FrameType | None) -> None:
        if interruption.deferred and not interruption.asked:
            interruption.asked = True
        else:
            raise Interrupted

    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)


def interrupt_in_time(number: int, frame: FrameType | None) -> None:
    """A signal handler for a flow: Ctrl-C, and `end_in_time`."""
    end_in_time()
    raise KeyboardInterrupt


def end_in_time() -> None:
    """End this process and all that it started where what it does to end in order takes too long.

    Prefect tells its server of every end, again and again for minutes where that is away.
    """

    def end() -> None:
        time.sleep(2 * GRACE)
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        os._exit(INTERRUPTED)

    threading.Thread(target=end, daemon=True).start()


def identity(process: psutil.Process) -> str:
    """A process in a word that no later process will have.

    When it started is the kernel's own count since the boot, where there is one: the time of day is another after the clock
    has been set, and whoever compares would take the process for gone.
    """
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_bytes()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        started = f"{stat.rpartition(b')')[2].split()[19].decode()}-{boot[:8]}"
    except OSError:
        started = f"{process.create_time():.2f}"
    return f"{process.pid}-{started}"


def dvc_above() -> psutil.Process | None:
    """The nearest `dvc` among the processes that this one came from, as far up as this user may look."""
    process: psutil.Process | None = psutil.Process()
    with contextlib.suppress(psutil.Error):
        while process is not None:
            if any(os.path.basename(word) == "dvc" for word in process.cmdline()[:3]):
                return process
            process = process.parent()
    return None


def alive(word: str) -> bool:
    """Whether the process of an `identity` is there and at work."""
    try:
        process = psutil.Process(int(word.partition("-")[0]))
        return identity(process) == word and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ValueError):
        return False


def die_with(words: Iterable[str], before: Callable[[], None] = lambda: None) -> None:
    """End this process, softly if it can be, soon after any of these processes (`identity`) is gone.

    The kernel's own way (PR_SET_PDEATHSIG) knows only the direct parent, which may be a shell that outlives DVC.

    Args:
        words: the processes.
        before: what to do first.
    """
    watched = list(words)
    if not watched:
        return

    def watch() -> None:
        while all(alive(word) for word in watched):
            time.sleep(0.5)
        before()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def step_works_for() -> list[str]:
    """The processes without which a step has nobody to work for: the flow that named itself, and DVC."""
    found = [os.environ[PARENT]] if os.environ.get(PARENT) else []
    above = dvc_above()
    return found + ([identity(above)] if above else [])
