"""One run at a time in one workspace."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unfreeze.errors import UserError

FOLDER = Path(".unfreeze")

_held: set[str] = set()


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Be the only process in this workspace that does what is named while the block runs.

    The system gives the lock back when the process ends, however it ends. Who has it already, keeps it.

    Raises:
        UserError: another process is at it; says which.
    """
    if name in _held:
        yield
        return
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / f"{name}.lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"Another {name} is at work in {Path.cwd()} (process {file.read().strip() or 'unknown'}). "
                "Wait until it has ended, or stop it; or work in a second clone, which may share DVC's cache."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        _held.add(name)
        try:
            yield
        finally:
            _held.remove(name)
