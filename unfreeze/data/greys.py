"""One scale for the greys of more than 8 bits (16-bit PNG and TIFF, floats) of a data set.

A file does not say which of its values are black and white: those of a 12-bit detector end at 4095, Hounsfield units in
16 bits lie around 32768. A separate scale for each image would make the images of a data set incomparable, so the
common range of all their values is used (`data.grey_range: auto`), found before the first such image is packed.
"""

import logging
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unfreeze.data.decoding import FULL_RANGE, BrokenImage, raw_greys
from unfreeze.data.packed import Greys
from unfreeze.parallel import in_order
from unfreeze.progress import track
from unfreeze.settings.schema import Data

logger = logging.getLogger("unfreeze")

BINS = 256
"""Number of bins of the histogram."""
VALUES = 2_000_000
"""Largest number of pixels, of all images together, in the histogram."""
SOME = 1000
"""Largest number of files, evenly spread, that are examined if the range is given: they only give the histogram."""
AHEAD = 4
"""Images whose values are in memory at once, times the number of cores."""


class _Values(NamedTuple):
    """An image's lowest and highest value, and the values (K,) of some of its pixels."""

    low: float
    high: float
    some: NDArray[np.float64]


def look_at_greys(files: Sequence[str], data: Data) -> Greys:
    """The range of values of all images whose greys have more than 8 bits, and a histogram; no other image is decoded.

    Args:
        files: all images of the data set.
        data: settings; if `grey_range` is not ``auto``, it is used, and only a sample of the files is examined.

    Raises:
        TransientError: the disk, the network or the system fails.
    """
    if data.grey_range != "auto":
        files = files[:: -(-len(files) // SOME)]
    read = partial(_values, most=max(1, VALUES // len(files)), max_megapixels=data.max_megapixels)
    found = [values for values in track(in_order(read, files, AHEAD), "range of greys", len(files)) if values]
    low, high = (min(v.low for v in found), max(v.high for v in found)) if found else FULL_RANGE
    counts, _ = np.histogram(np.concatenate([np.empty(0), *(v.some for v in found)]), BINS, (low, high))
    span = (low, high) if low < high else (low, low + 1)
    shown = span if isinstance(data.grey_range, str) else data.grey_range
    logger.info("greys of more than 8 bits: %g is shown as black, %g as white (data.grey_range)", *shown)
    return Greys(shown, len(found), (low, high), counts.tolist())


def _values(file: str, most: int, max_megapixels: float) -> _Values | None:
    """The values of an image whose greys have more than 8 bits; None for any other, and for one that cannot be read."""
    try:
        greys = raw_greys(file, max_megapixels)
    except BrokenImage:
        return None
    if greys is None or not (values := greys[np.isfinite(greys)]).size:
        return None
    # An odd step, so that the pixels are not all from the same columns.
    some = values[:: -(-values.size // most) | 1].astype(float)
    return _Values(float(values.min()), float(values.max()), some)
