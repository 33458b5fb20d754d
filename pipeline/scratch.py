"""Folder of a step's checkpoints, and the hash of their dependencies.

Checkpoints are kept outside of DVC's outputs, because DVC removes its outputs before it runs a step. Checkpoints and
hard links to finished files stay when the step ends. They are removed when a later step begins, because only then it
is certain that DVC has stored the outputs.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.artifacts import STAGES, artifact

ROOT = Path(".unfreeze/checkpoints")


def fingerprint(stage: str, settings: Mapping[str, Any]) -> str:
    """Hash of all dependencies of a step's result: its settings, and the files and folders in `dvc.yaml`."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name in yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]["deps"]:
        digest.update(name.encode())
        for path in _files(Path(name)):
            digest.update(path.as_posix().encode())
            if path.suffix == ".bin":  # pixels may be gigabytes: dataset.json beside them has their fingerprint
                digest.update(str(path.stat().st_size).encode())
            else:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _files(path: Path) -> list[Path]:
    """The file, or all files of the folder in order, except Python's compiled files, as in `.dvcignore`."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return [path] if path.is_file() else []


def clear_earlier(stage: str) -> None:
    """Remove the checkpoints of earlier steps that have finished."""
    for earlier in STAGES[: STAGES.index(stage)]:
        if artifact(earlier, "metrics.json").exists():  # which DVC removes before it runs the step again
            shutil.rmtree(ROOT / earlier, ignore_errors=True)


def clear_foreign(kept: Path) -> None:
    """Remove a step's checkpoints that were written with other settings, images or code."""
    for other in kept.parent.glob("*"):
        if other != kept:
            shutil.rmtree(other, ignore_errors=True)
