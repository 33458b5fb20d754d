"""Journal: a queue on disk of records for the tracking server, one folder per execution of a step.

    .unfreeze/tracking/<pass>/<when>-<stage>/head.json      names of the runs, their parameters and tags
                                             records.jsonl  records to be logged, one per line, in order
                                             files/         copies: a later pass may overwrite the originals
                                             sent.json      position up to which the server has received records

The process that writes a journal holds a lock on its records. The system releases the lock when that process ends,
also if it is killed. So an unlocked journal gets no further records, and can be sent to its end. If it has no end
record, its step was killed.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline.artifacts import write_json
from pipeline.process.lock import hold_if_free
from pipeline.process.secrets import mask
from pipeline.process.workspace import workspace
from unfreeze.errors import UserError
from unfreeze.persistence.atomic import sync

ROOT = Path(".unfreeze/tracking")
"""Folder of the journals, in the workspace."""
FORGET = 24 * 3600
"""Age in seconds at which the folder of a pass without unsent records is removed."""

Record = dict[str, Any]


class Busy(Exception):
    """Another process is sending."""


class Journal:
    """Writer of a journal. If the disk is full, records are kept in memory and written with the next ones."""

    def __init__(self, head: Mapping[str, Any]) -> None:
        """Create a journal.

        Args:
            head: ``pass`` is the key of the pass, ``stage`` the step's name; the rest is for the sender.

        Raises:
            UserError: the journal cannot be written.
        """
        self.head = dict(head)
        name = f"{time.time_ns():020d}-{head['stage'] or 'pass'}"
        new = pass_folder(head["pass"]) / f".new-{name}"
        try:
            (new / "files").mkdir(parents=True)
            self._file = (new / "records.jsonl").open("ab", buffering=0)
            fcntl.flock(self._file, fcntl.LOCK_EX)
            write_json(new / "head.json", self.head)
            self.folder = new.rename(new.with_name(name))  # now visible to other processes
            sync(self.folder.parent)  # before the run is created on a server: without the journal, nothing would end it
        except OSError as error:
            raise UserError(f"Records for MLflow cannot be written to {new.parent}: {error.strerror}.") from None
        self._size, self._left = 0, b""

    def describe(self, **more: Any) -> None:
        """Add items to the head."""
        self.head |= more
        write_json(self.folder / "head.json", self.head)

    def write(self, *records: Record) -> None:
        """Append records. If they cannot be written completely, all are kept in memory until the next call."""
        self._left += b"".join(json.dumps(record).encode() + b"\n" for record in records)
        written = 0
        with suppress(OSError):
            written = self._file.write(self._left)
        if written == len(self._left):
            self._size, self._left = self._size + written, b""
        elif written:
            self._file.truncate(self._size)

    def keep(self, path: Path, text: bool = False) -> str:
        """Copy a file into the journal, with secrets masked if ``text``; returns the relative path of the copy."""
        number = len(list((self.folder / "files").iterdir()))
        copy = self.folder / "files" / str(number) / path.name
        copy.parent.mkdir()
        if text:
            copy.write_text(mask(path.read_text()))
        else:
            shutil.copyfile(path, copy)
        return str(copy.relative_to(self.folder))

    def close(self) -> None:
        """End writing, flush to disk and unlock: any process can send the journal now, also after a power loss."""
        with suppress(OSError):
            os.fsync(self._file.fileno())
        fcntl.flock(self._file, fcntl.LOCK_UN)  # closing alone does not unlock if a forked process has inherited it
        self._file.close()

    def sync(self) -> None:
        """Flush the journal to disk; errors are ignored."""
        for path in (*self.folder.rglob("*"), self.folder, self.folder.parent):
            with suppress(OSError):
                sync(path)


def root() -> Path:
    """Folder of the journals: in the workspace, also for an experiment that DVC runs in a copy of it."""
    return workspace() / ROOT


def pass_folder(key: str) -> Path:
    """Folder of a pass: its journals, and notes such as the id of its parent run."""
    return root() / quote(key, safe="")


def waiting() -> list[Path]:
    """The journals that are not completely sent, the oldest first."""
    return sorted((path.parent for path in root().glob("*/[!.]*/head.json")), key=lambda folder: folder.name)


def is_being_written(folder: Path) -> bool:
    """Whether the process that writes a journal is still running."""
    with (folder / "records.jsonl").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        return False


def read(folder: Path, offset: int) -> Iterator[tuple[Record, int]]:
    """The complete records from an offset on, each with the offset of its end, in bytes."""
    with (folder / "records.jsonl").open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return  # it is being written, or its writer was killed
            offset += len(line)
            yield json.loads(line), offset


def read_json(path: Path) -> dict[str, Any]:
    """Content of a file written by `write_json`; empty if it is missing or damaged."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def remove(folder: Path) -> None:
    """Remove a journal that is completely sent. It is renamed first, so that no process reads a partly removed one."""
    shutil.rmtree(folder.rename(folder.with_name(f".sent-{folder.name}")))


@contextmanager
def sending(patience: float) -> Iterator[None]:
    """Hold the lock for sending journals while the block runs.

    Raises:
        Busy: another process still holds it after `patience` seconds.
    """
    until = time.monotonic() + patience
    while not (file := hold_if_free(root() / "sending")):
        if time.monotonic() > until:
            raise Busy("another process is sending")
        time.sleep(0.1)
    with file:
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # as in Journal.close


def forget_old_passes() -> None:
    """Remove the folders of passes that are unchanged for a day and have no unsent records."""
    busy = {folder.parent for folder in waiting()}
    for folder in root().glob("*/"):
        with suppress(OSError):
            if folder not in busy and time.time() - folder.stat().st_mtime > FORGET:
                shutil.rmtree(folder)
