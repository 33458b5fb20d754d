"""What DVC cannot watch: it reads every file of the folder of images, and some it would wait for, or fail at with a traceback.

`ingest` sets such things aside; DVC does not get that far.
"""

import errno
import os
import stat
from collections.abc import Iterator

from unfreeze.errors import UserError
from unfreeze.sources import shown


def check_watchable(source: str) -> None:
    """Make sure that DVC can read all that is in a folder of images; opens none of it.

    Args:
        source: as `data.source` names it; what is no folder is fine.

    Raises:
        UserError: names the first things that it cannot read, and what to do.
    """
    if source.startswith("sample:") or not os.path.isdir(source):
        return
    found = [f"{shown(path)}: {why}" for path, why in _unwatchable(source)]
    if found:
        raise UserError(
            f"data.source: DVC, which watches {source}, cannot read {len(found)} of the things in it; remove them, or list "
            "the images in a CSV file and name that. Among them\n  " + "\n  ".join(found[:5])
        )


def _unwatchable(folder: str) -> Iterator[tuple[str, str]]:
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        try:
            status = os.stat(here)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(here) as opened:
                entries = sorted(opened, key=lambda entry: entry.name)
        except OSError as error:
            yield here, str(error.strerror)
            continue
        for entry in entries:
            if not _is_utf8(entry.name):
                yield entry.path, "its name is not UTF-8"
            elif entry.is_file(follow_symlinks=False):
                if not os.access(entry.path, os.R_OK):
                    yield entry.path, os.strerror(errno.EACCES)
            elif why := _trouble(entry.path):
                yield entry.path, why
            elif os.path.isdir(entry.path):
                waiting.append(entry.path)


def _trouble(path: str) -> str:
    """Why something that is no plain file cannot be read; nothing where it is a folder, or a link to what can."""
    try:
        mode = os.stat(path).st_mode
        if not os.access(path, os.R_OK):
            return os.strerror(errno.EACCES)
    except OSError as error:
        return str(error.strerror)
    return "" if stat.S_ISDIR(mode) or stat.S_ISREG(mode) else "a pipe, socket or device"


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
