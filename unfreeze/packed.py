"""Packed images: every image decoded once, its pixels in one file that is memory-mapped.

`pixels.bin` holds the images one after the other, (H, W, 3) bytes each, the shorter side `image_size`; `images.csv` says
for every image that was found where its pixels begin, or why there are none; `dataset.json` holds what is true of all.
"""

import json
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from unfreeze.errors import UserError

NUMBERS = ["width", "height", "packed_width", "packed_height", "offset"]
"""Columns of `images.csv` that are whole numbers (empty where an image was set aside); the others are text."""


@dataclass(frozen=True)
class PackedImages:
    """Images in a memory map; ``packed[i]`` is image i, a (H, W, 3) array of bytes whose shorter side is `image_size`.

    Attributes:
        pixels: the memory map.
        table: a row per image: path, label, split, group, width, height, digest and more.
        classes: sorted names; a class's number is its place here.
        labels: (N,) class numbers.
        sizes: (N, 2) width and height in pixels.
        offsets: (N,) where an image begins, in bytes.
        image_size: shorter side in pixels.
    """

    pixels: NDArray[np.uint8]
    table: pd.DataFrame
    classes: list[str]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]
    offsets: NDArray[np.int64]
    image_size: int

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> NDArray[np.uint8]:
        width, height = self.sizes[row]
        start = self.offsets[row]
        return self.pixels[start : start + width * height * 3].reshape(height, width, 3)

    def release(self) -> None:
        """Let go of the pages that were read: they stay in the system's cache, and this process does not grow."""
        if isinstance(self.pixels, np.memmap):
            self.pixels._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]

    def rows(self, split: str) -> NDArray[np.int64]:
        """Row numbers of a split's images: train, valid or test."""
        return np.flatnonzero(self.table["split"].to_numpy() == split)


def open_packed(folder: Path) -> PackedImages:
    """Open what `unfreeze.packing.pack` wrote. Raises UserError where it is not there, or not whole."""
    try:
        about = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        found = pd.read_csv(folder / "images.csv", keep_default_na=False, dtype=str)
        pixels = np.memmap(folder / "pixels.bin", np.uint8, "r")
        table = found[found["reason"] == ""].reset_index(drop=True).astype(dict.fromkeys(NUMBERS, np.int64))
        sizes = table[["packed_width", "packed_height"]].to_numpy(np.int64)
        numbers = {name: number for number, name in enumerate(about["classes"])}
        labels = table["label"].map(numbers.__getitem__).to_numpy(np.int64)
        image_size = int(about["image_size"])
    except OSError as error:
        raise UserError(f"There are no packed images in {folder} ({error}): run the step ingest first.") from None
    except (ValueError, KeyError, TypeError) as error:
        what = str(error).partition("\n")[0]
        raise UserError(f"The packed images in {folder} are damaged ({what}): run the step ingest again.") from None
    if len(pixels) != sizes.prod(1).sum() * 3:
        raise UserError(f"{folder / 'pixels.bin'} does not belong to images.csv beside it: run the step ingest again.")
    return PackedImages(pixels, table, about["classes"], labels, sizes, table["offset"].to_numpy(np.int64), image_size)
