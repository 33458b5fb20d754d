"""The workspace: the project's folder, with permanent files such as MLflow's records.

DVC runs experiments in temporary copies of it. What an experiment records is stored in the original, and outlives the
copy.
"""

import os
from contextlib import suppress
from pathlib import Path

COPIES = (".dvc", "tmp", "exps")
"""Folder in which ``dvc exp run --temp`` and DVC's queue copy the workspace, run an experiment, and remove the copy."""

DEPTHS = ((), ("standalone",))
"""Subfolders of `COPIES` that contain the copies: the folder itself for the queue, ``standalone`` for ``--temp``."""


def workspace() -> Path:
    """The project's folder, relative to the working directory; from one of DVC's copies, the original project."""
    here = Path.cwd().parts
    for end in range(len(here), len(COPIES), -1):
        if here[end - len(COPIES) : end] == COPIES:
            return Path(*[".."] * (len(here) - end + len(COPIES)))
    return Path()


def link_source(source: str) -> None:
    """Make images at a relative path outside of this workspace available in DVC's copies of it, by symbolic links.

    Args:
        source: value of `data.source`; any other kind of source is ignored.
    """
    parts = Path(os.path.normpath(source)).parts
    up = parts.count("..")
    if not up or up == len(parts) or workspace() != Path():
        return
    for depth in DEPTHS:
        copies = Path(*COPIES, *depth)
        if up >= len(copies.parts):  # the link would be outside of DVC's temporary folder
            continue
        beside = Path(os.path.normpath(copies.joinpath(*parts[1 : up + 1])))
        target = os.path.relpath(Path(*parts[: up + 1]), beside.parent)
        with suppress(OSError):  # then experiments in a copy do not find the images
            beside.parent.mkdir(parents=True, exist_ok=True)
            if beside.is_symlink() and os.readlink(beside) != target:
                beside.unlink()
            if not beside.is_symlink():
                beside.symlink_to(target)
