"""Checks before anything runs or is written: can images be listed, watched and split, and does the network fit?"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd

from pipeline.mirror import check_share
from pipeline.watchable import check_readable, check_watched
from unfreeze.data.decoding import BrokenImage, check_header
from unfreeze.data.sources import read_source
from unfreeze.data.splits import assign_splits
from unfreeze.errors import UserError
from unfreeze.settings.schema import Data, Settings

LOOKED_AT = 100
"""Number of images whose headers are read before anything runs: enough to detect a folder of other files quickly."""
NETWORK = ("backbone.", "data.image_size")
"""Prefixes of settings after whose change the network is checked. The check takes seconds, mostly to import torch."""


def check_images(settings: Settings) -> pd.DataFrame:
    """Check the images, the device and the location of shared checkpoints, without decoding an image.

    The images can be listed, watched by DVC and split, and the share of unreadable headers in a sample is not
    significantly greater than `data.max_broken`. CUDA works if it is required. If `checkpoint.share` is set,
    it is a valid address, and its driver is installed.

    Returns:
        The images, as `read_source` lists them.

    Raises:
        UserError: says what cannot be done, and with which image or class.
    """
    if settings.device == "cuda":
        from unfreeze.device import choose_device  # here, as torch takes seconds to import

        choose_device(settings.device)
    check_share(settings.checkpoint.share)
    data = settings.data
    check_readable(data.source)
    table = read_source(data.source, data.exclude, data.min_images)
    check_watched(data.source, table["file"])
    assign_splits(table.assign(digest=""), data.valid, data.test, settings.seed)
    looked_at, unreadable = look_at_some(table, data)
    chance = 0.0  # allowance for a sample: four standard deviations of its count of unreadable images
    if looked_at < len(table):
        chance = 4 * math.sqrt(looked_at * data.max_broken * (1 - data.max_broken))
    if len(unreadable) > data.max_broken * looked_at + chance:
        raise UserError(
            f"data.source: {len(unreadable)} of {looked_at} examined images of {data.source} cannot be read; "
            f"data.max_broken allows {data.max_broken:.0%} of all images. Among them:\n  " + "\n  ".join(unreadable[:5])
        )
    return table


def look_at_some(table: pd.DataFrame, data: Data) -> tuple[int, list[str]]:
    """Read the headers of `LOOKED_AT` images, evenly spread, or of all if there are fewer.

    Returns:
        Number of examined images, and path and reason of each that cannot be read.
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
    """`check_images`, and a check that network and weights exist and fit the image size. Raises UserError."""
    from unfreeze.models.backbones import check_backbone

    table = check_images(settings)
    check_backbone(settings.backbone.name, settings.backbone.weights, settings.data.image_size)
    return table


def check_for(overrides: Iterable[str]) -> Callable[[Settings], pd.DataFrame]:
    """The check that settings with these ``key=value`` changes must pass before they are saved."""
    return check_all if any(override.strip().startswith(NETWORK) for override in overrides) else check_images
