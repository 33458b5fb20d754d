"""Flush DVC's cache to disk, and remove incomplete files from it after a power loss.

DVC does not call fsync. A file that it cached shortly before a power loss may have its name and permissions but not its
content. DVC assumes that every file in the cache is complete: it would replace a correct output with an incomplete
one, and `dvc status` would report nothing.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from pipeline.artifacts import write_json
from pipeline.process.lock import ABOUT_CACHE
from pipeline.process.signals import identity

NOTE = ABOUT_CACHE / "on-disk.json"
"""File with the time of the last flush, and the ID of the boot in which it was recorded."""

RWLOCK = Path(".dvc/tmp/rwlock")
"""DVC's locks, by process ID. After a reboot these IDs may belong to other processes."""

PATIENCE = 10.0
"""Seconds to wait for the flush, so that a slow disk or an unreachable network drive does not block a step."""

TORN = "%s is incomplete after a power loss: it is removed from DVC's cache, and will be computed again."

MARGIN = 60.0
"""Tolerance in seconds for a clock that was set back in the meantime."""


def settle() -> None:
    """Flush all written data to disk, and record the time. Call after `drop_torn`."""
    now = time.time()
    waiting = threading.Thread(target=os.sync, daemon=True)
    waiting.start()
    waiting.join(PATIENCE)
    if not waiting.is_alive():
        ABOUT_CACHE.mkdir(parents=True, exist_ok=True)
        write_json(NOTE, {"boot": _boot(), "until": now})


def drop_torn() -> list[Path]:
    """After a reboot, remove DVC's locks, and files of its cache that were not flushed and do not match their hash.

    Returns:
        The files removed from the cache. DVC restores them from its remote, or computes them again.
    """
    try:
        noted = json.loads(NOTE.read_text(encoding="utf-8"))
        until = float(noted["until"]) - MARGIN
    except (OSError, ValueError, KeyError, TypeError):
        return []  # nothing was ever computed here
    if noted["boot"] == _boot():
        return []
    RWLOCK.unlink(missing_ok=True)
    torn = [path for path in _cached() if path.stat().st_mtime >= until and not _whole(path)]
    for path in torn:
        path.unlink(missing_ok=True)
    return torn


def _cached() -> Iterator[Path]:
    """All files of DVC's cache; none if the step runs without DVC."""
    found = subprocess.run([sys.executable, "-m", "dvc", "cache", "dir"], capture_output=True, text=True)
    if found.returncode == 0:
        yield from Path(found.stdout.strip(), "files", "md5").glob("??/*")


def _whole(path: Path) -> bool:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    return digest == (path.parent.name + path.name).removesuffix(".dir")


def _boot() -> str:
    """Unique ID of this boot, or of this start of a container.

    A container reuses process IDs after a restart, so its restart counts as a reboot. It is told apart by the start
    time of the container's first process.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{psutil.boot_time():.0f}"
    try:
        return f"{boot}-{identity(psutil.Process(1))}"
    except psutil.Error:  # it may be hidden
        return boot
