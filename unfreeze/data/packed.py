"""Packed images: every image decoded once, its pixels in one file that is read image by image.

`pixels.bin` holds the images one after the other, (H, W, 3) bytes each, the shorter side `image_size`; `images.csv` has
for every image found the offset of its pixels, or the reason why it has none; `dataset.json` describes the whole set.
"""

import json
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from unfreeze.errors import UserError

NUMBERS = ["width", "height", "packed_width", "packed_height", "offset"]
"""Columns of `images.csv` that are whole numbers (empty where an image was set aside); the others are text."""


ROWS = 5_000
"""Rows of `images.csv` read at a time: reading all at once would leave four times the table's size allocated."""

Pixels = NDArray[np.uint8]
GreyRange = tuple[float, float]
"""Values shown as black and as white, for greys of more than 8 bits."""
Pair = Sequence[int] | NDArray[np.int64]
Read = Callable[[int, Pixels], None]
"""``read(start, into)``: fill the contiguous array ``into`` with the bytes from position ``start`` on."""


@dataclass(frozen=True)
class Greys:
    """The greys of more than 8 bits in a data set.

    Attributes:
        range: values of black and of white.
        images: number of examined images with more than 8 bits per grey value.
        found: their lowest and highest value.
        counts: histogram of their values, in bins of equal width from the lowest to the highest.
    """

    range: GreyRange
    images: int
    found: GreyRange
    counts: list[int]


@dataclass(frozen=True)
class PackedImages:
    """Images in a file; ``packed[i]`` reads image i, a (H, W, 3) array of bytes whose shorter side is `image_size`.

    Attributes:
        read: function that reads the pixels.
        table: a row per image: path, label, split, group, width, height, digest and more.
        classes: sorted names; a class's number is its index here.
        labels: (N,) class numbers.
        sizes: (N, 2) width and height in pixels.
        offsets: (N,) where each image begins, in bytes.
        image_size: shorter side in pixels.
        greys: the greys of more than 8 bits; None if there are none and `data.grey_range` is auto.
    """

    read: Read
    table: pd.DataFrame
    classes: list[str]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]
    offsets: NDArray[np.int64]
    image_size: int
    greys: Greys | None = None

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> Pixels:
        return self.crop(row, (0, 0), self.sizes[row])

    @property
    def grey_range(self) -> GreyRange | None:
        """Values of black and white for greys of more than 8 bits; None if `data.grey_range` is auto and none occur."""
        return None if self.greys is None else self.greys.range

    def crop(self, row: int, low: Pair, high: Pair, out: Pixels | None = None) -> Pixels:
        """Read a rectangle of image ``row``; only the rectangle's rows are read from the file.

        Args:
            row: number of the image.
            low, high: (column, row) of the rectangle's first pixel, and of its end (exclusive).
            out: array (H, W, 3) to write to; without an intermediate copy if it is contiguous and as wide as the image.

        Raises:
            UserError: the file has been cut short.
        """
        (x0, y0), (x1, y1) = low, high
        width = self.sizes[row, 0]
        start = int(self.offsets[row] + y0 * width * 3)
        if out is not None and x1 - x0 == width and out.flags.c_contiguous:
            self.read(start, out)
            return out
        rows = np.empty((y1 - y0, width, 3), np.uint8)
        self.read(start, rows)
        if out is None:
            return rows[:, x0:x1]
        out[:] = rows[:, x0:x1]
        return out

    def rows(self, split: str) -> NDArray[np.int64]:
        """Row numbers of a split's images: train, valid or test."""
        return np.flatnonzero(self.table["split"].to_numpy() == split)


def open_packed(folder: Path) -> PackedImages:
    """Open the output of `unfreeze.data.packing.pack`. Raises UserError if it is missing or incomplete."""
    pixels = folder / "pixels.bin"
    try:
        about = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        parts = pd.read_csv(folder / "images.csv", keep_default_na=False, dtype=str, chunksize=ROWS)
        table = pd.concat([_packed(part) for part in parts], ignore_index=True)
        size = pixels.stat().st_size
        packed = packed_images(pixels, table, int(about["image_size"]), about["classes"])
        packed = replace(packed, greys=_greys(about.get("greys")))
    except OSError as error:
        raise UserError(f"There are no packed images in {folder} ({error}): run the step ingest first.") from None
    except (ValueError, KeyError, TypeError) as error:
        what = str(error).partition("\n")[0]
        raise UserError(f"The packed images in {folder} are damaged ({what}): run the step ingest again.") from None
    if size != packed.sizes.prod(1).sum() * 3:
        raise UserError(f"{pixels} does not belong to images.csv beside it: run the step ingest again.")
    return packed


def _greys(said: Mapping[str, Any] | None) -> Greys | None:
    if said is None:
        return None
    return Greys(_pair(said["range"]), int(said["images"]), _pair(said["found"]), [int(n) for n in said["counts"]])


def _pair(values: Sequence[float]) -> GreyRange:
    low, high = values
    return float(low), float(high)


def packed_images(pixels: Path, table: pd.DataFrame, image_size: int, classes: list[str]) -> PackedImages:
    """Images whose pixels lie in a file.

    Args:
        pixels: the file.
        table: a row per image: label, packed_width, packed_height, offset and more.
        image_size: shorter side in pixels.
        classes: sorted names of the classes.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    labels = table["label"].map(numbers.__getitem__).to_numpy(np.int64)
    sizes = table[["packed_width", "packed_height"]].to_numpy(np.int64)
    return PackedImages(_reader(pixels), table, classes, labels, sizes, table["offset"].to_numpy(np.int64), image_size)


def _packed(part: pd.DataFrame) -> pd.DataFrame:
    """The rows of images that were not set aside."""
    return part[part["reason"] == ""].astype(dict.fromkeys(NUMBERS, np.int64))


def _reader(path: Path) -> Read:
    """Return a `Read` of a file, which uses no memory map.

    With a memory map, pages near those that are accessed would count as this process's memory, some 100 MB for a batch,
    and a file that is truncated meanwhile would kill the process by a signal.
    """
    descriptor = os.open(path, os.O_RDONLY)

    def read(start: int, into: Pixels) -> None:
        left = into.reshape(-1)
        while left.size and (found := os.preadv(descriptor, [left.data], start)):
            left, start = left[found:], start + found  # some file systems return fewer bytes than requested
        if left.size:
            raise UserError(f"{path} has been cut short: run the step ingest again.")

    weakref.finalize(read, os.close, descriptor)
    return read


def in_memory(pixels: Pixels) -> Read:
    """Return a `Read` of an array (N,) of bytes."""

    def read(start: int, into: Pixels) -> None:
        into.reshape(-1)[:] = pixels[start : start + into.size]

    return read
