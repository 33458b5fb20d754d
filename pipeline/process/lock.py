"""File locks, released when the process ends: one run at a time in a workspace, and locks on any file."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from unfreeze.errors import UserError

FOLDER = Path(".unfreeze")
ABOUT_CACHE = FOLDER / "about-cache"
"""Folder of notes about DVC's cache, shared by all workspaces that share the cache."""

_held: set[str] = set()


@contextmanager
def alone(name: str, patience: float = 0.0) -> Iterator[None]:
    """Hold this workspace's lock of this name while the block runs.

    The system releases the lock when the process ends, also if it is killed. A process may acquire it repeatedly.

    Args:
        name: ``run`` or ``step``.
        patience: seconds to wait for another process, which may be about to end.

    Raises:
        UserError: another process holds the lock; names it.
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


def hold(path: Path, shared: bool = False) -> IO[str]:
    """Wait for the lock of a file, and hold it until the returned file is closed or the process ends.

    Args:
        path: created if it does not exist.
        shared: take a shared lock instead of an exclusive one.

    Returns:
        The open file.
    """
    while not (file := _hold(path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)):
        pass  # the lock's last holder has removed the file
    return file


def hold_if_free(path: Path) -> IO[str] | None:
    """Take the lock without waiting, like `hold`; None if another process holds it."""
    try:
        return _hold(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None


def _hold(path: Path, how: int) -> IO[str] | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(file, how)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except BaseException:
        file.close()
        raise
    file.close()
    return None
