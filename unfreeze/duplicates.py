"""Images that are in a data set twice: exactly, or nearly (resized, saved anew)."""

from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from unfreeze.packed import PackedImages

NEAR = 2
"""Bits of 64 in which the difference hashes of near duplicates may differ."""
FLAT = 8
"""Hashes with fewer (or more) set bits than this belong to images without structure, which all look alike to them."""
DIFFERENCE = 4.0
"""Mean difference of grey values, of 255, up to which two small images are the same."""
MOST = 20
"""Members of one bucket that are compared with each other: a thousand copies need not make half a million pairs."""


def find_duplicates(packed: PackedImages) -> pd.DataFrame:
    """Pairs of duplicate images.

    Near duplicates are found through the pigeonhole principle: hashes that differ in two bits agree in one of three
    parts, so only images that share a part are compared. Hashes take images of one kind (cells, chest X-rays) for alike,
    so of every pair that they find the pixels are compared as well.

    Args:
        packed: the images; their table holds digest, average_hash (64-bit difference hash as hex), split and label.

    Returns:
        Columns row_a, row_b (row numbers), kind (``exact`` or ``near``), leak (in different splits), conflict
        (with different labels); leaks and conflicts first.
    """
    table = packed.table
    exact = set(_pairs([table["digest"].to_numpy()]))
    hashes = np.array([int(text, 16) for text in table["average_hash"]], np.uint64)
    parts = [(hashes >> np.uint64(shift)) & np.uint64(2**bits - 1) for shift, bits in ((0, 21), (21, 21), (42, 22))]
    structured = np.array([FLAT <= int(value).bit_count() <= 64 - FLAT for value in hashes])
    near = {
        (a, b)
        for a, b in _pairs(parts)
        if structured[a] and structured[b] and int(hashes[a] ^ hashes[b]).bit_count() <= NEAR and (a, b) not in exact
        and _alike(packed[a], packed[b])
    }  # fmt: skip
    rows = [(a, b, "exact") for a, b in sorted(exact)] + [(a, b, "near") for a, b in sorted(near)]
    pairs = pd.DataFrame(rows, columns=["row_a", "row_b", "kind"])
    for name, column in (("leak", "split"), ("conflict", "label")):
        values = table[column].to_numpy()
        pairs[name] = values[pairs["row_a"].to_numpy(int)] != values[pairs["row_b"].to_numpy(int)]
    return pairs.sort_values(["conflict", "leak", "kind"], ascending=[False, False, True], ignore_index=True)


def _pairs(keys: list[np.ndarray]) -> list[tuple[int, int]]:
    """Pairs of rows that share a key."""
    found: set[tuple[int, int]] = set()
    for key in keys:
        for rows in pd.Series(range(len(key))).groupby(key).groups.values():
            found.update(combinations(list(rows[:MOST]), 2))
    return sorted(found)


def _alike(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> bool:
    """Whether two images, made small and grey, are the same but for what saving and resizing does."""
    small = [
        np.asarray(Image.fromarray(image).convert("L").resize((32, 32), Image.Resampling.BOX), np.float32)
        for image in (a, b)
    ]
    return bool(np.abs(small[0] - small[1]).mean() <= DIFFERENCE)
