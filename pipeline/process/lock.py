"""One run at a time in one workspace."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unfreeze.errors import UserError

FOLDER = Path(".unfreeze")

_held: set[str] = set()


@contextmanager
def alone(name: str, patience: float = 0.0) -> Iterator[None]:
    """Be the only process in this workspace that does what is named while the block runs.

    The system gives the lock back when the process ends, however it ends. Who has it already, keeps it.

    Args:
        name: what is done: ``run`` or ``step``.
        patience: seconds to wait for another process, which may be about to end.

    Raises:
        UserError: another process is at it; says which.
    """
    if name in _held:
        yield
        return
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / f"{name}.lock").open("a+", encoding="utf-8") as file:
        until = time.monotonic() + patience
        while not (got := _lock(file.fileno())) and time.monotonic() < until:
            time.sleep(0.1)
        if not got:
            file.seek(0)
            raise UserError(
                f"Another {name} is at work in {Path.cwd()} (process {file.read().strip() or 'unknown'}). "
                "Wait until it has ended, or stop it; or work in a second clone, which may share DVC's cache."
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        _held.add(name)
        try:
            yield
        finally:
            _held.remove(name)


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
