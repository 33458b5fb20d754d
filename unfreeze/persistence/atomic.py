"""Atomic writes: after a power loss a file is either complete or unchanged, provided that fsync is reliable."""

import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically, flushed to disk. Raises OSError; the file is then the earlier or the new one, complete."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        put_in_place(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def put_in_place(partial: Path, path: Path) -> None:
    """Flush a written file to disk, then rename it to its final name. Raises OSError."""
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk (fsync). Raises OSError."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
