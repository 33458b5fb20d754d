"""Provenance of a run: its commit, uncommitted changes of code and settings, machine and user."""

import getpass
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.process.git import GitError, git
from pipeline.process.secrets import mask
from unfreeze.errors import UserError
from unfreeze.settings.schema import flatten
from unfreeze.settings.yaml_loader import read_yaml

CODE = ("unfreeze", "pipeline", "tasks", "flows", "dvc.yaml")
"""Files that determine a run's results, besides its settings and images."""
NAMED = ("data.source", "backbone.name", "data.image_size")
"""Settings that are always in a run's name."""
LONGEST = 200
"""Largest length of a name, to which the time is added: MLflow's limit is 250.

The description lists all settings that differ from the committed ones.
"""


def differing_settings(params: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, by dotted keys, that differ from the commit's; empty if there is no commit."""
    try:
        committed = read_yaml(git("show", "HEAD:./params.yaml"), "params.yaml")
    except (GitError, UserError):
        return {}
    before = flatten(committed) if isinstance(committed, Mapping) else {}
    return {key: value for key, value in params.items() if key not in before or before[key] != value}


def title(params: Mapping[str, Any]) -> str:
    """Name of a run: its images, backbone, image size, and the settings that differ from the committed ones."""
    source = Path(mask(str(params["data.source"])).removeprefix("sample:")).stem
    backbone = str(params["backbone.name"]).split(":")[-1]
    differing = {key: value for key, value in differing_settings(params).items() if key not in NAMED}
    words = [source[: LONGEST // 4], backbone, f"{params['data.image_size']} px", shown(differing)]
    name = " · ".join(word for word in words if word)
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def shown(settings: Mapping[str, Any]) -> str:
    """Settings in one line, with secrets masked."""
    return mask(", ".join(f"{key}={value}" for key, value in settings.items()))


def code_tags() -> dict[str, str]:
    """MLflow tags: the commit, and whether code differs from it; empty if there is no commit."""
    try:
        changed = "yes" if git("status", "--porcelain", "--", *CODE) else "no"
        return {"mlflow.source.git.commit": git("rev-parse", "HEAD"), "unfreeze.changed": changed}
    except GitError:
        return {}


def machine_tags() -> dict[str, str]:
    """MLflow tags: the machine and the user."""
    return {"unfreeze.host": socket.gethostname(), "mlflow.user": getpass.getuser()}


def description(params: Mapping[str, Any], address: str) -> str:
    """Description of a run in MLflow, in Markdown: where it ran, and which settings differ from the commit.

    Args:
        params: all settings of the run, by their dotted keys.
        address: URL of Prefect's flow run; empty if it has none.
    """
    differing = shown(differing_settings(params))
    lines = [
        f"On {socket.gethostname()}, as {getpass.getuser()}.",
        f"Prefect: {address}" if address else "",
        f"Settings that differ from the committed ones: `{differing}`" if differing else "",
    ]
    return "\n\n".join(line for line in lines if line)
