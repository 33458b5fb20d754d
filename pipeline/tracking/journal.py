"""What is to be logged waits on disk: a folder per execution of a step, until the tracking server has taken it.

    .unfreeze/tracking/<pass>/<when>-<stage>/head.json      what the runs are to be called, their parameters and tags
                                             records.jsonl  what is to be logged, one record a line, in order
                                             files/         copies: a later pass may write over the originals
                                             sent.json      how far the server has taken it

Whoever writes a journal holds a lock on its records, which the system lets go of when that process ends, however it
ends. So a journal that nobody holds is to be sent to its end, and one without an end belongs to a step that was killed.
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
from pipeline.process.secrets import mask
from pipeline.process.workspace import workspace
from unfreeze.errors import UserError
from unfreeze.persistence.atomic import sync

ROOT = Path(".unfreeze/tracking")
"""Where the journals lie, in the workspace."""
FORGET = 24 * 3600
"""Seconds after which the folder of a pass from which nothing waits is removed."""

Record = dict[str, Any]


class Busy(Exception):
    """Another process is sending."""


class Journal:
    """The writing end of a journal. What a full disk does not take is written with what comes next."""

    def __init__(self, head: Mapping[str, Any]) -> None:
        """Begin a journal.

        Args:
            head: ``pass`` is the key of the pass, ``stage`` the step's name; the rest is for the sender.

        Raises:
            UserError: nothing can be written here.
        """
        self.head = dict(head)
        name = f"{time.time_ns():020d}-{head['stage'] or 'pass'}"
        new = pass_folder(head["pass"]) / f".new-{name}"
        try:
            (new / "files").mkdir(parents=True)
            self._file = (new / "records.jsonl").open("ab", buffering=0)
            fcntl.flock(self._file, fcntl.LOCK_EX)
            write_json(new / "head.json", self.head)
            self.folder = new.rename(new.with_name(name))  # from now on it is seen
            sync(self.folder.parent)  # before a server knows of it: nobody else would end the run there
        except OSError as error:
            raise UserError(f"What MLflow is to be told cannot be written to {new.parent}: {error.strerror}.") from None
        self._size, self._left = 0, b""

    def describe(self, **more: Any) -> None:
        """Add to the head."""
        self.head |= more
        write_json(self.folder / "head.json", self.head)

    def write(self, *records: Record) -> None:
        """Append records, all or, until the next time, none."""
        self._left += b"".join(json.dumps(record).encode() + b"\n" for record in records)
        written = 0
        with suppress(OSError):
            written = self._file.write(self._left)
        if written == len(self._left):
            self._size, self._left = self._size + written, b""
        elif written:
            self._file.truncate(self._size)

    def keep(self, path: Path, text: bool = False) -> str:
        """Copy a file into the journal; returns its name there. Of text only what everybody may see is copied."""
        number = len(list((self.folder / "files").iterdir()))
        copy = self.folder / "files" / str(number) / path.name
        copy.parent.mkdir()
        if text:
            copy.write_text(mask(path.read_text()))
        else:
            shutil.copyfile(path, copy)
        return str(copy.relative_to(self.folder))

    def close(self) -> None:
        """End writing; what is written can be sent by anyone, also after a loss of power."""
        with suppress(OSError):
            os.fsync(self._file.fileno())
        fcntl.flock(self._file, fcntl.LOCK_UN)  # closing would not do where a forked process has inherited it
        self._file.close()

    def sync(self) -> None:
        """Have what waits survive a loss of power, as far as the system can tell."""
        for path in (*self.folder.rglob("*"), self.folder, self.folder.parent):
            with suppress(OSError):
                sync(path)


def root() -> Path:
    """Where the journals lie: in the workspace, also those of an experiment that DVC runs in a copy of it."""
    return workspace() / ROOT


def pass_folder(key: str) -> Path:
    """Where the journals of a pass lie, and what is known of it."""
    return root() / quote(key, safe="")


def waiting() -> list[Path]:
    """The journals that are not sent to their end, the oldest first."""
    return sorted((path.parent for path in root().glob("*/[!.]*/head.json")), key=lambda folder: folder.name)


def is_being_written(folder: Path) -> bool:
    """Whether the process that writes a journal is still there."""
    with (folder / "records.jsonl").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        return False


def read(folder: Path, offset: int) -> Iterator[tuple[Record, int]]:
    """The whole records from an offset on, each with the offset after it, in bytes."""
    with (folder / "records.jsonl").open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return  # it is being written, or its writer was killed
            offset += len(line)
            yield json.loads(line), offset


def read_json(path: Path) -> dict[str, Any]:
    """A file that `write_json` has written; empty where there is none, or none that is sound."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def remove(folder: Path) -> None:
    """Remove a journal that is sent to its end, at once: half of one would be taken for a whole."""
    shutil.rmtree(folder.rename(folder.with_name(f".sent-{folder.name}")))


@contextmanager
def sending(patience: float) -> Iterator[None]:
    """Be the one who sends while the block runs.

    Raises:
        Busy: another process is, and has not ended in so many seconds.
    """
    root().mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + patience
    with (root() / "sending").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > until:
                    raise Busy("another process is sending") from None
                time.sleep(0.1)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # as in Journal.close


def forget_old_passes() -> None:
    """Remove the folders of passes from which nothing has come for a day and nothing waits."""
    busy = {folder.parent for folder in waiting()}
    for folder in root().glob("*/"):
        with suppress(OSError):
            if folder not in busy and time.time() - folder.stat().st_mtime > FORGET:
                shutil.rmtree(folder)
