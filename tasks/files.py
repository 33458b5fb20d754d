"""Where steps write, small files whole or not at all, and what is said where the disk does not take them."""

import errno
import json
import os
from pathlib import Path
from typing import Any

from unfreeze.durable import write_whole

FULL, FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), (errno.EACCES, errno.EPERM, errno.EROFS)
"""What the system says when there is no space for a file, and when it may not be written or read."""


def artifact(stage: str, name: str) -> Path:
    """The path of a file that a step writes, relative to the project's root, where every step runs."""
    return Path("artifacts") / stage / name


def write_json(path: Path, value: Any) -> None:
    """Write JSON, for people to read as well, whole or not at all."""
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def disk_trouble(error: OSError, where: Path | None = None) -> str:
    """A sentence for a full disk or a closed folder, empty for any other error.

    Args:
        error: what the system said.
        where: the file or folder, if the error names none; without it only a full disk is told.
    """
    file = error.filename or where or (Path() if error.errno in FULL else None)
    if error.errno not in FULL + FORBIDDEN or file is None:
        return ""
    path = Path(os.fsdecode(file)).absolute()
    mend = "Make space" if error.errno in FULL else "See who may read and write there"
    return f"{path}: {error.strerror}. {mend}, and start again: what was finished is kept."
