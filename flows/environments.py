"""The Python environment for a commit: the worker's own if it meets the commit's constraints, else a new one.

So a changed `constraints.txt` is rolled out like any other file. An environment is created once and reused.
"""

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.process.environment import home
from pipeline.process.lock import hold, hold_if_free
from unfreeze.errors import UserError

READY = ".ready"
TOOLS = ("bench", "dev", "local-team")
"""Extras of the project that no run needs."""


def use_environment(folder: Path) -> None:
    """Switch to an environment with the versions that a commit pins.

    If this process's environment lacks them, this process is restarted in another one, which is created if necessary.

    Args:
        folder: a clone of the project.

    Raises:
        UserError: the environment cannot be created.
    """
    environment = home() / "environments" / _key(folder)
    if Path(sys.prefix).resolve() == environment or meets(folder):
        return
    with hold(environment.with_suffix(".lock")):
        if not (environment / READY).exists():
            _make(environment, folder)
        (environment / READY).touch()  # time of its last use
    earlier = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *([earlier] if earlier else [])])
    python = str(environment / "bin/python")
    os.execv(python, [python, *sys.orig_argv[1:]])


def forget_old_environments(seconds: float) -> None:
    """Remove environments that no run has switched to for this many seconds, except that of this process."""
    for ready in (home() / "environments").glob(f"*/{READY}"):
        environment = ready.parent
        if Path(sys.prefix).resolve() != environment and (held := hold_if_free(environment.with_suffix(".lock"))):
            with held:
                if time.time() - ready.stat().st_mtime > seconds:
                    ready.unlink()  # first: a partly removed environment must not be used
                    shutil.rmtree(environment, ignore_errors=True)


def meets(folder: Path) -> bool:
    """Whether this environment has all dependencies of a clone of the project, at the versions that the clone pins."""
    installed = _installed()
    for pin in _pins(folder):
        if (version := installed.get(canonicalize_name(pin.name))) and not pin.specifier.contains(version, True):
            return False
    return all(canonicalize_name(needed.name) in installed for needed in _dependencies(folder) if _applies(needed))


def _make(environment: Path, folder: Path) -> None:
    shutil.rmtree(environment, ignore_errors=True)
    environment.parent.mkdir(parents=True, exist_ok=True)
    uv = [sys.executable, "-m", "uv", "--quiet"]
    files = ["--constraint", str(folder / "constraints.txt"), "--requirements", str(folder / "pyproject.toml")]
    for command in (
        [*uv, "venv", "--python", sys.executable, str(environment)],
        [*uv, "pip", "install", "--python", str(environment), "--compile-bytecode", *files, *_added(folder)],
    ):
        done = subprocess.run(command, cwd=environment.parent, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise UserError(
                f"The environment of the commit's constraints.txt cannot be created: {said[-1] if said else command}"
            )


def _added(folder: Path) -> list[str]:
    """Packages of this environment that a new one needs too: those of the project's extras, such as `team`, and
    packages that are neither pinned nor required by an installed package."""
    known = {canonicalize_name(requirement.name) for requirement in (*_pins(folder), *_dependencies(folder))}
    for package in importlib.metadata.distributions():
        known |= {canonicalize_name(Requirement(text).name) for text in package.requires or []}
    here = _installed().keys()
    extras = {str(needed) for needed in _extras(folder) if canonicalize_name(needed.name) in here and _applies(needed)}
    return sorted(extras | here - known - {"unfreeze", "pip", "setuptools", "wheel", "uv"})


def _installed() -> dict[str, str]:
    return {canonicalize_name(package.name): package.version for package in importlib.metadata.distributions()}


def _pins(folder: Path) -> Iterator[Requirement]:
    file = folder / "constraints.txt"
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        if (text := line.partition("#")[0].strip()) and _applies(pin := Requirement(text)):
            yield pin


def _dependencies(folder: Path) -> Iterator[Requirement]:
    yield from map(Requirement, _project(folder).get("dependencies", []))


def _extras(folder: Path) -> Iterator[Requirement]:
    """The requirements of the project's extras that a run may need."""
    for name, texts in _project(folder).get("optional-dependencies", {}).items():
        if name not in TOOLS:
            yield from map(Requirement, texts)


def _project(folder: Path) -> dict[str, Any]:
    file = folder / "pyproject.toml"
    return dict(tomllib.loads(file.read_text(encoding="utf-8"))["project"]) if file.exists() else {}


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate()


def _key(folder: Path) -> str:
    names = sorted(map(str, (*_pins(folder), *_dependencies(folder))))
    return hashlib.sha256("\n".join([sys.version, *names]).encode()).hexdigest()[:12]
