"""How a step ends early: on a stop request, or when the flow or DVC that runs it has ended."""

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
"""Environment variable with the `identity` of the flow that runs the step."""

INTERRUPTED = 130
"""Exit code of an interrupted run, as in shells."""

GRACE = 20.0
"""Seconds between a stop request to a process and SIGKILL."""


def stop_when_asked(interruption: Interruption) -> None:
    """Install handlers of SIGTERM and Ctrl-C: a training ends after its batch and a checkpoint, other code at once.

    A second signal ends a training at once.
    """

    def handler(number: int, frame: FrameType | None) -> None:
        if interruption.deferred and not interruption.asked:
            interruption.asked = True
        else:
            raise Interrupted

    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)


def interrupt_in_time(number: int, frame: FrameType | None) -> None:
    """Signal handler of a flow: call `end_in_time`, and raise KeyboardInterrupt."""
    end_in_time()
    raise KeyboardInterrupt


def end_in_time() -> None:
    """Kill this process and its child processes if an orderly end takes too long.

    Prefect reports every end to its server, and retries for minutes if the server does not answer.
    """

    def end() -> None:
        time.sleep(2 * GRACE)
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        os._exit(INTERRUPTED)

    threading.Thread(target=end, daemon=True).start()


def identity(process: psutil.Process) -> str:
    """Process ID plus start time, which identify a process uniquely.

    On Linux the start time is in clock ticks since boot. A time of day would change when the clock is
    set, and the process would seem to have ended.
    """
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_bytes()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        started = f"{stat.rpartition(b')')[2].split()[19].decode()}-{boot[:8]}"
    except OSError:
        started = f"{process.create_time():.2f}"
    return f"{process.pid}-{started}"


def dvc_above() -> psutil.Process | None:
    """The nearest `dvc` among the parent processes, as far up as this user has permission."""
    process: psutil.Process | None = psutil.Process()
    with contextlib.suppress(psutil.Error):
        while process is not None:
            if any(os.path.basename(word) == "dvc" for word in process.cmdline()[:3]):
                return process
            process = process.parent()
    return None


def alive(word: str) -> bool:
    """Whether the process of an `identity` is running, and not a zombie."""
    try:
        process = psutil.Process(int(word.partition("-")[0]))
        return identity(process) == word and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ValueError):
        return False


def die_with(words: Iterable[str], before: Callable[[], None] = lambda: None) -> None:
    """End this process by SIGTERM, then SIGKILL, soon after any of these processes (`identity`) has ended.

    The kernel's mechanism (PR_SET_PDEATHSIG) covers only the direct parent, which may be a shell that outlives DVC.

    Args:
        words: identities of the processes.
        before: called before the signals are sent.
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
    """The processes whose end must end a step: the flow in `PARENT`, and DVC."""
    found = [os.environ[PARENT]] if os.environ.get(PARENT) else []
    above = dvc_above()
    return found + ([identity(above)] if above else [])
