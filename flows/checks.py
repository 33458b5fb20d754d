"""What is refused before anything runs or is written: images that cannot be listed, watched or split, and a wrong network.

DVC reads every file of the folder of images, and some it would wait for, or fail at with a traceback. `ingest` sets such
things aside; DVC does not get that far.
"""

import errno
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pandas as pd

from unfreeze.data.decoding import BrokenImage, check_header
from unfreeze.data.sources import read_source, shown
from unfreeze.data.splits import assign_splits
from unfreeze.errors import UserError
from unfreeze.settings.schema import Data, Settings

LOOKED_AT = 100
"""Images whose headers are looked at before anything runs: enough to find a folder of what are no images, in a moment."""
NETWORK = ("backbone.", "data.image_size")
"""How the keys begin that say which network sees what: seeing that they fit takes seconds, most of them to import torch."""


def check_images(settings: Settings) -> pd.DataFrame:
    """See that the images can be listed, watched by DVC, and split, that some of them are images, and that CUDA works where
    it is asked for.

    No image is decoded.

    Returns:
        The images, as `read_source` lists them.

    Raises:
        UserError: says what cannot be done, and with which image or class.
    """
    if settings.device == "cuda":
        from unfreeze.device import choose_device  # here, as torch takes seconds to import

        choose_device(settings.device)
    data = settings.data
    table = read_source(data.source)
    check_watchable(data.source)
    assign_splits(table.assign(digest=""), data.valid, data.test, settings.seed)
    looked_at, unreadable = look_at_some(table, data)
    chance = 0.0  # that some of more images are worse than all of them
    if looked_at < len(table):
        chance = 4 * math.sqrt(looked_at * data.max_broken * (1 - data.max_broken))
    if len(unreadable) > data.max_broken * looked_at + chance:
        raise UserError(
            f"data.source: of {looked_at} images of {data.source} that were looked at, {len(unreadable)} cannot be read, "
            f"where data.max_broken allows {data.max_broken:.0%} of all, among them\n  " + "\n  ".join(unreadable[:5])
        )
    return table


def look_at_some(table: pd.DataFrame, data: Data) -> tuple[int, list[str]]:
    """Look at the headers of `LOOKED_AT` images, evenly spread, or of all where there are fewer.

    Returns:
        How many were looked at, and of each that cannot be read its path and why.
    """
    some = table.iloc[np.linspace(0, len(table) - 1, min(LOOKED_AT, len(table)), dtype=int)]
    unreadable = []
    for file, path in zip(some["file"], some["path"], strict=True):
        try:
            check_header(file, data.max_megapixels)
        except BrokenImage as error:
            unreadable.append(f"{path}: {error}")
    return len(some), unreadable


def check_all(settings: Settings) -> pd.DataFrame:
    """The same, and that the network and its weights are there and take images of this size. Raises UserError."""
    from unfreeze.models.backbones import check_backbone

    table = check_images(settings)
    check_backbone(settings.backbone.name, settings.backbone.weights, settings.data.image_size)
    return table


def check_for(overrides: Iterable[str]) -> Callable[[Settings], pd.DataFrame]:
    """What settings with these ``key=value`` changes have to pass before they are kept."""
    return check_all if any(override.strip().startswith(NETWORK) for override in overrides) else check_images


def check_watchable(source: str) -> None:
    """Make sure that DVC can read all that is in a folder of images; opens none of it.

    Args:
        source: as `data.source` names it; what is no folder is fine.

    Raises:
        UserError: names the first things that it cannot read, and what to do.
    """
    if source.startswith("sample:") or not os.path.isdir(source):
        return
    found = [f"{shown(path)}: {why}" for path, why in _unwatchable(source)]
    if found:
        raise UserError(
            f"data.source: DVC, which watches {source}, cannot read {len(found)} of the things in it; remove them, or list "
            "the images in a CSV file and name that. Among them\n  " + "\n  ".join(found[:5])
        )


def _unwatchable(folder: str) -> Iterator[tuple[str, str]]:
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        try:
            status = os.stat(here)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(here) as opened:
                entries = sorted(opened, key=lambda entry: entry.name)
        except OSError as error:
            yield here, str(error.strerror)
            continue
        for entry in entries:
            if not _is_utf8(entry.name):
                yield entry.path, "its name is not UTF-8"
            elif entry.is_file(follow_symlinks=False):
                if not os.access(entry.path, os.R_OK):
                    yield entry.path, os.strerror(errno.EACCES)
            elif why := _trouble(entry.path):
                yield entry.path, why
            elif os.path.isdir(entry.path):
                waiting.append(entry.path)


def _trouble(path: str) -> str:
    """Why something that is no plain file cannot be read; nothing where it is a folder, or a link to what can."""
    try:
        mode = os.stat(path).st_mode
        if not os.access(path, os.R_OK):
            return os.strerror(errno.EACCES)
    except OSError as error:
        return str(error.strerror)
    return "" if stat.S_ISDIR(mode) or stat.S_ISREG(mode) else "a pipe, socket or device"


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
