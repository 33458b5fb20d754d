"""DVC, as the flow uses it: which stages are stale, and reproduce one."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from unfreeze.errors import UserError

NOISE = (
    "To track the changes with git",
    "git add",
    "To enable auto staging",
    "dvc config core.autostage",
    "Use `dvc push`",
    "Updating lock file",
    "Generating lock file",
    "> python -m tasks ",
    "Running stage",
)
"""What DVC says to a person at a prompt, and to nobody in a log."""

CACHED = ("didn't change, skipping", "is cached - skipping run")


def environment() -> dict[str, str]:
    """The environment for DVC and the stages' commands: ``python`` is the one that runs now."""
    return os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONUNBUFFERED": "1",
    }


def dvc(*words: str) -> list[str]:
    """The command line of DVC in this interpreter's environment."""
    return [sys.executable, "-m", "dvc", *words]


def stale_stages() -> set[str]:
    """Names of the stages that `dvc status` finds changed.

    Raises:
        UserError: DVC cannot tell, with what it says.
    """
    done = subprocess.run(dvc("status", "--json"), capture_output=True, text=True, env=environment())
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).partition("\n\n")[0]
        raise UserError(f"DVC cannot tell what has changed: {said}")
    return set(json.loads(done.stdout or "{}"))


def has_remote() -> bool:
    """Whether a default remote is configured, to pull from and push to."""
    done = subprocess.run(dvc("remote", "default"), capture_output=True, text=True, env=environment())
    return done.returncode == 0


def reproduce(stage: str, pull: bool) -> Iterator[str]:
    """Have DVC bring one stage up to date, yielding what it and the stage print, line by line.

    Args:
        stage: name of the stage.
        pull: look in the remote for what the cache lacks.

    Raises:
        subprocess.CalledProcessError: the stage failed.
    """
    command = dvc("repro", "--single-item", stage, *(["--pull"] if pull else []))
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment()
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                yield line.rstrip()
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def push() -> str | None:
    """Push artifacts and the run cache to the default remote; returns what went wrong, if anything."""
    done = subprocess.run(dvc("push", "--run-cache"), capture_output=True, text=True, env=environment())
    return None if done.returncode == 0 else done.stderr.strip()


def is_noise(line: str) -> bool:
    """Whether a line of DVC's output is of no use in a log."""
    text = line.strip()
    return not text or text.startswith(NOISE)


def is_cached(line: str) -> bool:
    """Whether DVC says in this line that it need not run the stage."""
    return line.startswith("Stage '") and any(word in line for word in CACHED)
