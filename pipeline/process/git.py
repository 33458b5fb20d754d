"""Run Git: returns its output, or raises its error."""

import os
import subprocess
from pathlib import Path

from pipeline.process.secrets import mask

TIMEOUT = 600.0
"""Timeout of Git in seconds: a server may be unavailable without refusing connections."""


class GitError(Exception):
    """Git failed; the message is the first line of its error output, with secrets masked."""


def git(*words: str, folder: Path | str = ".") -> str:
    """Run a Git command in a folder; returns its output.

    Git does not prompt for a password; if a server requires one and no credential helper has it, the command fails.

    Raises:
        GitError: it failed, or is not installed.
    """
    quiet = {"GIT_TERMINAL_PROMPT": "0", "GIT_SSH_COMMAND": os.environ.get("GIT_SSH_COMMAND", "ssh -o BatchMode=yes")}
    try:
        done = subprocess.run(
            # Git refuses to read a clone that another user owns, as in a container. The clone is trusted: its code
            # runs here.
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
