"""Run DVC for the flow: find stale stages, reproduce a stage, push."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.process.lock import ABOUT_CACHE
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
"""Prefixes of DVC's hints for interactive use, which are left out of logs."""

NO_REMOTE = 3
FIND_REMOTE = f"""
import sys
from dvc.config import NoRemoteError
from dvc.repo import Repo
try:
    remote = Repo().cloud.get_remote_odb()
except NoRemoteError:
    sys.exit({NO_REMOTE})
remote.fs.exists(remote.path)
"""
PUSH_BESIDE = """
from dvc.lock import LockNoop
from dvc.repo import Repo
repo = Repo()
repo.lock = LockNoop()
repo.push(run_cache=True)
"""
"""`dvc push --run-cache` without DVC's lock, which a running step holds; a push does not change the workspace."""
UNREADABLE_LOCK = re.compile(r"dvc\.lock' (is invalid|validation failed)|unable to read: '[^']*dvc\.lock'")
"""DVC's error messages for a `dvc.lock` that it cannot read."""
PATIENCE = 30.0
"""Timeout in seconds for a remote to answer; DVC would wait for many minutes."""

NOTING = 1.0
"""Seconds to wait for another workspace's DVC to fill a new folder of the shared run cache; it takes milliseconds."""

TO_PUSH = ABOUT_CACHE / "to-push"

CACHED = ("didn't change, skipping", "is cached - skipping run")


def environment() -> dict[str, str]:
    """The environment for DVC and the stages' commands: ``python`` is the current interpreter."""
    return os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",  # regardless of the terminal's encoding: this process reads the output
    }


def dvc(*words: str) -> list[str]:
    """The command line of DVC in this interpreter's environment."""
    return [sys.executable, "-m", "dvc", *words]


class DamagedLock(UserError):
    """DVC cannot read `dvc.lock`."""


def stale_stages() -> set[str]:
    """Names of the stages that `dvc status` finds changed.

    Raises:
        DamagedLock: DVC cannot read `dvc.lock`, and it has no merge conflicts.
        UserError: `dvc status` fails, with DVC's message.
    """
    done = subprocess.run(dvc("status", "--json"), capture_output=True, text=True, env=environment())
    if done.returncode == 0:
        return set(json.loads(done.stdout or "{}"))
    said = (done.stderr.strip() or done.stdout.strip()).partition("\n\n")[0]
    if said.endswith("is not a git repository"):
        raise UserError(
            "This folder is not a Git repository, which DVC needs: use a clone of the project, or run `git init` here."
        )
    if UNREADABLE_LOCK.search(said) and "merge conflicts" in said:
        raise UserError(
            "dvc.lock has merge conflicts. Resolve those of params.yaml and dvc.yaml, take one side's dvc.lock (`git "
            "checkout --ours dvc.lock`), and start again: it is updated, and results in DVC's cache are reused."
        )
    raise (DamagedLock if UNREADABLE_LOCK.search(said) else UserError)(f"DVC cannot tell what has changed: {said}")


def put_lock_aside() -> Path:
    """Move a damaged `dvc.lock` aside; returns its new path.

    DVC writes the file in place, so that a kill or a power loss at that moment truncates it. The results that it
    listed are in the run cache too, and are restored from there.
    """
    return Path("dvc.lock").replace("dvc.lock.damaged")


def find_remote() -> tuple[bool, str | None]:
    """Whether a default remote for pull and push is configured; and the reason if it cannot be used now."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", FIND_REMOTE], capture_output=True, text=True, env=environment(), timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return True, f"no answer in {PATIENCE:.0f} seconds"
    if done.returncode == NO_REMOTE:
        return False, None
    return True, None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it cannot be opened"])[-1]


def reproduce(stage: str, pull: bool) -> Iterator[str]:
    """Have DVC reproduce one stage; yields the output of DVC and the stage line by line.

    Args:
        stage: name of the stage.
        pull: fetch results that are not in the cache from the remote.

    Raises:
        subprocess.CalledProcessError: the stage failed.
    """
    command = dvc("repro", "--single-item", stage, *(["--pull"] if pull else []))
    while True:
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
        if process.returncode == 0:
            return
        if not (empty := _forget_empty_runs()):
            raise subprocess.CalledProcessError(process.returncode, command)
        yield f"DVC was killed while it wrote to its run cache: removed {', '.join(map(str, empty))}, and retrying."


def _forget_empty_runs() -> list[Path]:
    """Remove empty folders from DVC's run cache, which make DVC fail with a TypeError; returns them.

    DVC creates a run's folder, and moves the run's file into it a moment later. A kill in between leaves it empty.
    """
    done = subprocess.run(dvc("cache", "dir"), capture_output=True, text=True, env=environment())
    if done.returncode:
        return []
    empty = [folder for folder in Path(done.stdout.strip(), "runs").glob("??/*") if not any(folder.iterdir())]
    if empty:
        time.sleep(NOTING)
    return [folder for folder in empty if _removed(folder)]


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:  # it is no longer empty
        return False
    return True


def push(pauses: Sequence[float] = (2, 8), beside: bool = False) -> str | None:
    """Push artifacts and the run cache to the default remote; returns the last error, if it failed.

    Args:
        pauses: seconds to wait before each further attempt.
        beside: push while DVC runs a step in this workspace.
    """
    command = [sys.executable, "-c", PUSH_BESIDE] if beside else dvc("push", "--run-cache")
    TO_PUSH.parent.mkdir(parents=True, exist_ok=True)
    TO_PUSH.touch()
    for pause in (0, *pauses):
        time.sleep(pause)
        there, trouble = find_remote()
        if not there:  # so there is nothing left to push
            TO_PUSH.unlink()
            return None
        if trouble is None:
            done = subprocess.run(command, capture_output=True, text=True, env=environment())
            if done.returncode == 0:
                TO_PUSH.unlink()
                return None
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            trouble = errors[-1] if errors else done.stderr.strip()  # DVC prints one for each file
    return trouble


def to_push() -> bool:
    """Whether the last push failed or was interrupted."""
    return TO_PUSH.exists()


def share_cache(worktree: Path) -> None:
    """Configure a worktree's DVC with this project's cache and local configuration, such as a remote's password."""
    local = Path(".dvc/config.local")
    if local.exists():
        shutil.copy(local, worktree / ".dvc/config.local")
    cache = subprocess.run(dvc("cache", "dir"), capture_output=True, text=True, env=environment()).stdout.strip()
    configure = dvc("config", "--local", "cache.dir", os.path.abspath(cache))
    subprocess.run(configure, cwd=worktree, capture_output=True, env=environment(), check=True)


def is_noise(line: str) -> bool:
    """Whether a line of DVC's output is of no use in a log."""
    text = line.strip()
    return not text or text.startswith(NOISE)


def is_cached(line: str) -> bool:
    """Whether DVC reports in this line that it does not need to run the stage."""
    return line.startswith("Stage '") and any(word in line for word in CACHED)
