"""The steps, their output folders, and small files that are written atomically."""

import json
from pathlib import Path
from typing import Any

from unfreeze.persistence.atomic import write_whole

STAGES = (
    "ingest",
    "explore",
    "precompute",
    "lr_find",
    "train_head",
    "train_augmented",
    "unfreeze_lr_find",
    "train_full",
    "evaluate",
    "retrain",
    "register",
)
"""Names of the steps, in the order of the recipe. Prefect's tasks, DVC's stages and MLflow's child runs share them."""


def artifact(stage: str, name: str) -> Path:
    """The path of a file that a step writes, relative to the project's root, where every step runs."""
    return Path("artifacts") / stage / name


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
