"""Git, a command: what it says, or why it does not."""

import os
import subprocess
from pathlib import Path

from pipeline.process.secrets import mask

TIMEOUT = 600.0
"""Seconds after which Git is taken not to answer: a server may be away without saying so."""


class GitError(Exception):
    """Git failed; the message is the last line of its output, with secrets masked."""


def git(*words: str, folder: Path | str = ".") -> str:
    """Run a command of Git's in a folder; returns what it prints.

    Nobody is there to be asked for a password: a server that wants one is refused.

    Raises:
        GitError: it failed, or is not installed.
    """
    quiet = {"GIT_TERMINAL_PROMPT": "0", "GIT_SSH_COMMAND": os.environ.get("GIT_SSH_COMMAND", "ssh -o BatchMode=yes")}
    try:
        done = subprocess.run(
            # Git tells nothing of a clone of somebody else's, as in a container. The code that runs here is from that clone.
            ["git", "-c", "safe.directory=*", *words],
            cwd=folder,
            env=os.environ | quiet,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        raise GitError(f"no answer in {TIMEOUT:.0f} seconds") from None
    except OSError as error:
        raise GitError(f"git cannot be run: {error.strerror}") from None
    if done.returncode:
        raise GitError(mask((done.stderr.strip().splitlines() or ["it does not say why"])[0]))
    return done.stdout.strip()
