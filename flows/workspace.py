"""Workspaces for runs of the deployment: clones of the newest commit of the deployed branch.

`prepare` is the deployment's pull step (`prefect.yaml`). Prefect's worker calls it in a new process. The flow then runs
in that process, in the folder that `prepare` returns, so all other code comes from the commit. Runs of the same commit
and settings use the same workspace. `UNFREEZE_HOME` contains the workspaces, and the files that outlive them:

    repositories/<hash>.git                  fetched repositories
    workspaces/<commit>-<hash of settings>/  removed after success; kept after an interruption, to continue
    environments/<hash>/                     for commits whose constraints.txt the worker's own environment does not meet
    cache/, hashes/                          DVC's cache, and its table of file hashes
    locks/<hash of settings>.lock            the dvc.lock of the last successful run with these settings
    tracking/, about-cache/                  queues for MLflow and for DVC's remote
    mlflow.db, mlruns/                       MLflow's data if MLFLOW_TRACKING_URI is not set
    cards/                                   the runs' reservations of GPUs
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flows.environments import forget_old_environments, use_environment
from flows.flow_run import preparing, say_what_it_computes, wait_for_equal
from pipeline.process.cards import one_card
from pipeline.process.environment import DEFAULT_TRACKING_URI, home
from pipeline.process.git import GitError, git
from pipeline.process.lock import ABOUT_CACHE, FOLDER, hold, hold_if_free
from pipeline.process.secrets import mask
from pipeline.tracking.journal import ROOT
from unfreeze.errors import UserError

LOCK = "UNFREEZE_WORKSPACE_LOCK"
"""Environment variable with the descriptor of the lock that keeps a run's workspace from being removed."""
PAUSES = (0, 2, 8)
"""Seconds to wait before each attempt to reach the repository."""
FORGET = 14 * 24 * 3600
"""Seconds after which unused files are removed: environments, and workspaces of interrupted or failed runs."""
OUTLIVES = {ROOT: "tracking", ABOUT_CACHE: "about-cache"}
"""Folders of a workspace that are links into `UNFREEZE_HOME`."""
SHARE = """
import pathlib, shutil, sys
from dvc.config import Config
from dvc.repo import Repo
cache, hashes, site = sys.argv[1:]
with Config.from_cwd().edit("local") as local:
    local.setdefault("cache", {})["dir"] = cache
    local.setdefault("core", {})["site_cache_dir"] = site
with Repo() as repo:
    own = pathlib.Path(repo.site_cache_dir, "hashes")
if not own.is_symlink():
    shutil.rmtree(own, ignore_errors=True)
    own.symlink_to(hashes)
"""
"""Script that makes DVC share its cache and its table of file hashes: otherwise each run would hash all images."""


def prepare(repository: str, branch: str) -> dict[str, str]:
    """Create the workspace of this flow run, or reuse that of an interrupted run with the same commit and settings.

    Args:
        repository: address or folder of a Git repository.
        branch: the run starts from its newest commit.

    Returns:
        ``directory``: the working directory for the flow.

    Raises:
        UserError: the branch cannot be fetched; the flow run's log also has the message.
    """
    with preparing() as run:
        commit = fetch(repository, branch)
        name = f"{commit[:12]}-{settings_key(run.parameters)}"
        folder = make(repository, commit, name)
        use_environment(folder)
        say_what_it_computes(run, name)
    return {"directory": str(folder)}


@contextmanager
def at_work() -> Iterator[None]:
    """Context of a run of the deployment; does nothing in a checkout.

    Waits for an equal run, reserves a GPU, and removes the workspace after success.
    """
    folder = Path.cwd()
    if not is_workspace(folder):
        yield
        return
    furnish(folder)
    wait_for_equal(is_shared)
    with one_card():
        yield
    leave(folder)
    forget_old()


def fetch(repository: str, branch: str) -> str:
    """Fetch a branch into this worker's bare clone of the repository; returns its newest commit."""
    bare, head = _bare(repository), f"refs/heads/{branch}"
    with hold(bare.with_suffix(".lock")):
        if not (bare / "HEAD").exists():
            bare.mkdir(parents=True, exist_ok=True)
            git("init", "--quiet", "--bare", folder=bare)
        for pause in PAUSES:
            time.sleep(pause)
            try:
                git("fetch", "--quiet", "--no-tags", repository, f"+{head}:{head}", folder=bare)
                return git("rev-parse", head, folder=bare)
            except GitError as error:
                trouble = str(error)
    raise UserError(
        f"The deployment runs the branch {branch} of {mask(repository)}, which cannot be fetched: {trouble}. Was it "
        "pushed, and may the worker's user read it?"
    )


def make(repository: str, commit: str, name: str) -> Path:
    """The workspace of this name, cloned if it does not exist; this process's lock keeps it from being removed."""
    folder = home() / "workspaces" / name
    if LOCK not in os.environ:  # set if this process was restarted in another environment
        file = hold(_lock(folder), shared=True)
        os.environ[LOCK] = str(os.dup(file.fileno()))
        os.set_inheritable(int(os.environ[LOCK]), True)  # kept if `use_environment` restarts this process
    if not folder.exists():
        partial = folder.with_name(f".new-{name}-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        git("clone", "--quiet", "--no-checkout", str(_bare(repository)), str(partial), folder=folder.parent)
        git("checkout", "--quiet", "--detach", commit, folder=partial)
        try:
            partial.rename(folder)
        except OSError:  # another run was faster
            shutil.rmtree(partial)
    return folder


def settings_key(parameters: Mapping[str, Any]) -> str:
    """Hash of the flow run's non-empty parameters: settings, settings file, `until` and `sweep`."""
    given = {key: value for key, value in parameters.items() if value}
    return hashlib.sha256(json.dumps(given, sort_keys=True, default=str).encode()).hexdigest()[:12]


def is_workspace(folder: Path) -> bool:
    """Whether a folder is the workspace of a deployed run, not a checkout."""
    return folder.resolve().parent == home() / "workspaces"


def furnish(folder: Path) -> None:
    """Link a workspace to this worker's cache and queues, if that is not done yet."""
    if os.environ.get("MLFLOW_TRACKING_URI", DEFAULT_TRACKING_URI) == DEFAULT_TRACKING_URI:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{home() / 'mlflow.db'}"
    with hold(folder / FOLDER / "furnish.lock"):
        if not all((folder / link).is_symlink() for link in OUTLIVES):
            _furnish(folder)


def _furnish(folder: Path) -> None:
    (home() / "hashes").mkdir(exist_ok=True)
    site = folder / ".dvc/tmp/site"  # removed with the workspace
    command = [sys.executable, "-c", SHARE, str(home() / "cache"), str(home() / "hashes"), str(site)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"DVC cannot be set up in {folder}: {done.stderr.strip().splitlines()[-1]}")
    with suppress(FileNotFoundError):
        shutil.copyfile(_lock_file(folder), folder / "dvc.lock")
    if (folder / "dvc.lock").exists():  # outputs that are missing in the cache will be computed
        subprocess.run([sys.executable, "-m", "dvc", "checkout", "--quiet"], cwd=folder, stderr=subprocess.DEVNULL)
    for link, name in OUTLIVES.items():
        (home() / name).mkdir(exist_ok=True)
        if not (folder / link).is_symlink():
            (folder / link).symlink_to(home() / name)


def is_shared() -> bool:
    """Whether another process of this host uses this run's workspace."""
    descriptor = int(os.environ[LOCK])
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_SH)


def leave(folder: Path) -> None:
    """Remove this run's workspace, whose results are in the cache, unless another run uses it."""
    try:
        fcntl.flock(int(os.environ[LOCK]), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    with suppress(OSError):
        _lock_file(folder).parent.mkdir(exist_ok=True)
        (folder / "dvc.lock").replace(_lock_file(folder))
    os.chdir(home())
    _remove(folder)


def forget_old() -> None:
    """Remove workspaces, `dvc.lock` files and environments that have not been used for `FORGET` seconds."""
    forget_old_environments(FORGET)
    for file in (home() / "locks").glob("*"):
        if time.time() - file.stat().st_mtime > FORGET:
            file.unlink(missing_ok=True)
    for folder in (home() / "workspaces").glob("*/"):
        used = max(path.stat().st_mtime for path in (folder, folder / FOLDER) if path.exists())
        if time.time() - used > FORGET and (held := hold_if_free(_lock(folder))):
            with held:
                _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a workspace whose lock is held. It is renamed first, so that no run finds a partly removed one."""
    gone = folder.with_name(f".gone-{folder.name}")
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(OSError):  # a leftover only takes up space
        folder.rename(gone)
        _lock(folder).unlink()
        shutil.rmtree(gone)


def _lock_file(folder: Path) -> Path:
    """Path of the `dvc.lock` of the last successful run with a workspace's settings; DVC skips the steps in it."""
    return home() / "locks" / f"{folder.name.partition('-')[2]}.lock"


def _lock(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _bare(repository: str) -> Path:
    return home() / "repositories" / f"{hashlib.sha256(repository.encode()).hexdigest()[:12]}.git"
