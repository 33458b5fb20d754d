"""Errors with a complete message for users, and the message for files that cannot be written or read."""

import errno
import os
from pathlib import Path

FULL, FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), (errno.EACCES, errno.EPERM, errno.EROFS)
"""Error codes for a lack of disk space, and for a file that may not be written or read."""


class UserError(Exception):
    """An error whose cause is outside the program, for example in the settings or the images.

    The message says what is wrong, where (file, key, image) and what to do. It is shown without a traceback, and the
    process exits with code 2.
    """


class TransientError(UserError):
    """A temporary error, for which a retry may help; a step ends with code 1."""


def disk_trouble(error: OSError, where: Path | None = None) -> str:
    """Error message for a full disk or a lack of permission; empty for any other error.

    Args:
        error: raised by the operating system.
        where: the file or folder, if the error names none; without either, only a full disk is reported.
    """
    file = error.filename or where or (Path() if error.errno in FULL else None)
    if error.errno not in FULL + FORBIDDEN or file is None:
        return ""
    path = Path(os.fsdecode(file)).absolute()
    mend = "Make space" if error.errno in FULL else "See who may read and write there"
    return f"{path}: {error.strerror}. {mend}, and start again: what was finished is kept."
