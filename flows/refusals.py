"""What is refused before anything runs or is written: images that cannot be listed, watched or split, and a wrong network."""

from collections.abc import Callable, Iterable

import pandas as pd

from flows.watched import check_watchable
from unfreeze.settings import Settings
from unfreeze.sources import read_source
from unfreeze.splits import assign_splits

NETWORK = ("backbone.", "data.image_size")
"""How the keys begin that say which network sees what: seeing that they fit takes seconds, most of them to import torch."""


def check_images(settings: Settings) -> pd.DataFrame:
    """See that the images can be listed, watched by DVC, and split; opens none of them.

    Returns:
        The images, as `read_source` lists them.

    Raises:
        UserError: says what cannot be done, and with which image or class.
    """
    data = settings.data
    table = read_source(data.source)
    check_watchable(data.source)
    assign_splits(table.assign(digest=""), data.valid, data.test, settings.seed)
    return table


def check_all(settings: Settings) -> pd.DataFrame:
    """The same, and that the network and its weights are there and take images of this size. Raises UserError."""
    from unfreeze.backbones import check_backbone

    table = check_images(settings)
    check_backbone(settings.backbone.name, settings.backbone.weights, settings.data.image_size)
    return table


def check_for(overrides: Iterable[str]) -> Callable[[Settings], pd.DataFrame]:
    """What settings with these ``key=value`` changes have to pass before they are kept."""
    return check_all if any(override.strip().startswith(NETWORK) for override in overrides) else check_images
