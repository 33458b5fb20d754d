"""What DVC has taken is made to survive a loss of power, and after one what did not is found.

DVC waits for no disk. Of what it took shortly before the power failed, its cache may have the name and the rights and not
the content; and it takes what has a name there for whole, puts it over an output that is right, and `dvc status` sees
nothing wrong.
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
"""Up to which moment all that was written is on the disk, and the boot that this was noted in."""

RWLOCK = Path(".dvc/tmp/rwlock")
"""Where DVC notes by number which processes are at which files: after another boot the numbers are those of others."""

PATIENCE = 10.0
"""Seconds to wait for the disks: one that is slow, or a network's that is gone, holds up no step."""

TORN = "%s was not on the disk yet when the machine stopped: it is removed from DVC's cache, and made again."

MARGIN = 60.0
"""Seconds by which the clock may have been set back meanwhile."""


def settle() -> None:
    """Wait until what has been written is on the disk, and note that it is. To be called after `drop_torn`."""
    now = time.time()
    waiting = threading.Thread(target=os.sync, daemon=True)
    waiting.start()
    waiting.join(PATIENCE)
    if not waiting.is_alive():
        ABOUT_CACHE.mkdir(parents=True, exist_ok=True)
        write_json(NOTE, {"boot": _boot(), "until": now})


def drop_torn() -> list[Path]:
    """After another boot, remove from DVC's cache what was not on the disk yet and is not what its name says, and its locks.

    Returns:
        What was removed from the cache. DVC restores it from its remote, or has it made again.
    """
    try:
        noted = json.loads(NOTE.read_text(encoding="utf-8"))
        until = float(noted["until"]) - MARGIN
    except (OSError, ValueError, KeyError, TypeError):
        return []  # nothing was ever made here
    if noted["boot"] == _boot():
        return []
    RWLOCK.unlink(missing_ok=True)
    torn = [path for path in _cached() if path.stat().st_mtime >= until and not _whole(path)]
    for path in torn:
        path.unlink(missing_ok=True)
    return torn


def _cached() -> Iterator[Path]:
    """All that DVC's cache has; nothing where a step runs without DVC."""
    found = subprocess.run([sys.executable, "-m", "dvc", "cache", "dir"], capture_output=True, text=True)
    if found.returncode == 0:
        yield from Path(found.stdout.strip(), "files", "md5").glob("??/*")


def _whole(path: Path) -> bool:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    return digest == (path.parent.name + path.name).removesuffix(".dir")


def _boot() -> str:
    """The boot, or the start of a container on a machine that runs on, in a word that no other has.

    A container's processes get the numbers of those before its restart, so it counts as a boot; its first process says
    when it started.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{psutil.boot_time():.0f}"
    try:
        return f"{boot}-{identity(psutil.Process(1))}"
    except psutil.Error:  # it may be hidden
        return boot
