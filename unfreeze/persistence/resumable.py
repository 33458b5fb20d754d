"""A file that is written piece by piece, and that another process can resume after an interruption.

A second file beside it has a note for every piece, with a checksum of the file up to the end of the piece. Pieces are
flushed to disk before their notes, so that after a power loss every noted piece is complete.
"""

import contextlib
import json
import logging
import os
import shutil
import time
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from unfreeze.persistence.atomic import sync
from unfreeze.persistence.interruption import SHARE

logger = logging.getLogger("unfreeze")

BLOCK = 1 << 20
"""Bytes that are read at once when a file is checked."""
COPIES = 3
"""Multiple of a finished file's size that must be free to keep a hard link to it.

DVC copies the file into its cache, and from the cache back into the workspace.
"""


class Piece(NamedTuple):
    """A piece's note, its end in bytes, and the checksum (CRC-32) of the file up to there."""

    note: Any
    end: int
    checksum: int


START = Piece(None, 0, 0)


class ResumableFile:
    """A file that is written piece by piece, as a context manager; its pieces are kept also if the block raises."""

    def __init__(self, path: Path, key: str, seconds: float) -> None:
        """Open a file, with the pieces that an earlier process has written.

        Args:
            path: the file; its notes are kept in ``<path>.notes``.
            key: identifies what its content depends on; pieces with another key are discarded.
            seconds: time between two flushes to disk; longer if they would take over 2 % of the time.

        Raises:
            OSError: it cannot be written there.
        """
        self.path = path
        self._key, self._seconds, self._cost = key, seconds, 0.0
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        if path.stat().st_nlink > 1 or not os.access(path, os.W_OK):
            _copy(path, path)  # it is a hard link to an output, perhaps in DVC's cache, which must not change
        self._file, self._noted = path.open("r+b"), _notes(path).open("a+b")
        self._pieces: list[Piece] = []
        self._safe = 0, 0  # number of noted pieces, and size of their notes in bytes
        self._restore()
        self._last = time.monotonic()

    @property
    def notes(self) -> list[Any]:
        """The notes of all pieces, in their order, including those of earlier processes."""
        return [piece.note for piece in self._pieces]

    @property
    def size(self) -> int:
        """Size of all pieces in bytes."""
        return self._end.end

    @property
    def _end(self) -> Piece:
        return self._pieces[-1] if self._pieces else START

    def append(self, content: bytes, note: Any) -> None:
        """Add a piece, with a JSON-serializable note."""
        self._file.write(content)
        # A single operation, which a signal cannot interrupt.
        self._pieces.append(Piece(note, self.size + len(content), zlib.crc32(content, self._end.checksum)))
        if time.monotonic() - self._last >= max(self._seconds, self._cost / SHARE):
            self.keep()

    def keep(self) -> None:
        """Flush all pieces and their notes to disk. If interrupted, it can be called again."""
        start = time.monotonic()
        self._file.flush()
        os.fsync(self._file.fileno())
        count, size = self._safe
        self._noted.truncate(size)
        if new := self._pieces[count:]:
            line = json.dumps({"key": self._key, "pieces": new}).encode() + b"\n"
            self._noted.write(line)
            self._noted.flush()
            os.fsync(self._noted.fileno())
            self._safe = count + len(new), size + len(line)
        self._last = time.monotonic()
        self._cost = self._last - start

    def cut(self, count: int) -> None:
        """Go back to the first ``count`` pieces."""
        del self._pieces[count:]
        self._safe = 0, 0
        self.keep()
        self._file.seek(self.size)
        self._file.truncate()

    def put(self, target: Path) -> None:
        """Put the finished file at its final path, atomically. Raises OSError, for example on a full disk.

        If the file system supports it, a hard link to the file stays at the old path. If the step is killed before DVC
        has stored the output, its next execution finds the finished file there. If there is no space for DVC's copies,
        no link is kept.
        """
        self.keep()
        self._file.close()
        self._noted.close()
        room = shutil.disk_usage(target.parent).free > COPIES * self.size
        for way in (_link, os.replace, _copy) if room else (os.replace, _copy):
            try:
                way(self.path, target)
                break
            except OSError:
                if way is _copy:
                    raise
        sync(target.parent)
        if not room:
            self.path.unlink(missing_ok=True)
        if not self.path.exists():
            _notes(self.path).unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file.closed:
            return
        with contextlib.suppress(OSError):  # for example a full disk: pieces that were flushed already are kept
            self.keep()
        for file in (self._file, self._noted):
            with contextlib.suppress(OSError):
                file.close()

    def _restore(self) -> None:
        """Keep the pieces before the first damaged line of notes, wrong checksum or other key, and discard the rest."""
        self._noted.seek(0)
        size = 0
        for line in self._noted:
            try:
                found = json.loads(line)
                pieces = [Piece(*piece) for piece in found["pieces"]]
                if found["key"] != self._key or not line.endswith(b"\n") or not self._reaches(pieces[-1]):
                    break
            except (ValueError, KeyError, TypeError, IndexError):
                break
            self._pieces += pieces
            size += len(line)
        if size < self._noted.seek(0, os.SEEK_END):
            logger.warning("%s is damaged, or from other settings: only its valid beginning is used.", self.path)
        self._safe = len(self._pieces), size
        self._file.seek(self.size)
        self._file.truncate()

    def _reaches(self, piece: Piece) -> bool:
        """Whether the checksum of the file up to the end of this piece is correct."""
        left, checksum = piece.end - self.size, self._end.checksum
        self._file.seek(self.size)
        while left > 0 and (block := self._file.read(min(left, BLOCK))):
            left, checksum = left - len(block), zlib.crc32(block, checksum)
        return left == 0 and checksum == piece.checksum


def _link(path: Path, target: Path) -> None:
    """Create a hard link to a file."""
    partial = _partial(target)
    partial.unlink(missing_ok=True)
    os.link(path, partial)
    try:
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)  # `replace` leaves it if both names are links to the same file already


def _copy(path: Path, target: Path) -> None:
    """Copy a file atomically; source and target may be on different disks, or the same path."""
    partial = _partial(target)
    try:
        shutil.copyfile(path, partial)
        sync(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _partial(target: Path) -> Path:
    return target.with_name(target.name + ".partial-put")


def _notes(path: Path) -> Path:
    return path.with_name(path.name + ".notes")
