"""Find duplicate images in a data set: exact ones, and near ones (resized, saved again)."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from unfreeze.data.packed import PackedImages

NEAR = 2
"""Bits of 64 in which the difference hashes of near duplicates may differ."""
FLAT = 8
"""Hashes with fewer set (or unset) bits than this belong to images without structure, and are all alike."""
DIFFERENCE = 4.0
"""Mean difference of grey values, of 255, up to which two small images are the same."""
SMALL = 32
"""Side in pixels at which images are compared."""
COPIES = 20
"""Largest number of later copies that an image is paired with: a thousand copies would make half a million pairs."""
REACH = 2000
"""Largest number of following images with the same part of the hash that an image is compared with."""
TOGETHER = 4096
"""Pairs whose pixels are compared at once."""

Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]


def find_duplicates(packed: PackedImages) -> pd.DataFrame:
    """Pairs of duplicate images.

    Near duplicates are found through the pigeonhole principle: hashes that differ in two bits agree in one of three
    parts, so only images that share a part are compared. Different images of one kind (cells, chest X-rays) may have
    nearly equal hashes, so the pixels of every pair found are compared as well.

    Args:
        packed: the images; their table holds digest, difference_hash (64-bit difference hash as hex), split and label.

    Returns:
        Columns row_a, row_b (row numbers), kind (``exact`` or ``near``), leak (in different splits), conflict
        (with different labels); conflicts and leaks first.
    """
    table = packed.table
    digest = pd.factorize(table["digest"])[0]
    hashes = np.array([int(text, 16) for text in table["difference_hash"]], np.uint64)
    exact = pd.DataFrame(_sharing(digest, hashes, COPIES), columns=["row_a", "row_b"]).assign(kind="exact")
    near = pd.DataFrame(_near(packed, hashes, digest), columns=["row_a", "row_b"]).assign(kind="near")
    pairs = pd.concat([exact, near], ignore_index=True)
    for name, column in (("leak", "split"), ("conflict", "label")):
        values = table[column].to_numpy()
        pairs[name] = values[pairs["row_a"].to_numpy()] != values[pairs["row_b"].to_numpy()]
    order = ["conflict", "leak", "kind", "row_a", "row_b"]
    return pairs.sort_values(order, ascending=[False, False, True, True, True], ignore_index=True)


def _near(packed: PackedImages, hashes: NDArray[np.uint64], digest: Rows) -> Rows:
    """Pairs (M, 2) of rows whose hashes and pixels are nearly, but not exactly, the same."""
    structured = np.flatnonzero((np.bitwise_count(hashes) >= FLAT) & (np.bitwise_count(hashes) <= 64 - FLAT))
    some, of = hashes[structured], digest[structured]
    small = np.empty((len(structured), SMALL * SMALL), np.uint8)  # rows are filled when they are first compared
    is_known = np.zeros(len(structured), bool)

    def alike(a: Rows, b: Rows) -> Mask:
        differ = of[a] != of[b]
        a, b = a[differ], b[differ]
        rows = np.unique(np.concatenate([a, b]))
        for row in rows[~is_known[rows]]:
            small[row] = _small(packed[structured[row]]).ravel()
        is_known[rows] = True
        parts = [slice(i, i + TOGETHER) for i in range(0, len(a), TOGETHER)]
        apart = [np.abs(small[a[part]].astype(np.int16) - small[b[part]]).mean(1) for part in parts]
        differ[differ] = np.concatenate([[], *apart]) <= DIFFERENCE
        return differ

    parts = [(some >> np.uint64(shift)) & np.uint64(2**bits - 1) for shift, bits in ((0, 21), (21, 21), (42, 22))]
    return structured[np.unique(np.concatenate([_sharing(part, some, REACH, alike) for part in parts]), axis=0)]


def _sharing(
    key: NDArray[np.generic], hashes: NDArray[np.uint64], reach: int, alike: Callable[[Rows, Rows], Mask] | None = None
) -> Rows:
    """Pairs (M, 2) of rows that have the same key, and hashes that differ in at most `NEAR` bits.

    Each row is compared with the next ``reach`` rows of the same key, in the order of their hashes, until it is in
    `COPIES` pairs with them. ``alike`` takes rows a and b, (N,) each, and returns which of the pairs count.
    """
    order = np.lexsort((hashes, key))
    found = [np.empty((0, 2), np.int64)]
    start, copies = np.arange(len(order)), np.zeros(len(order), int)
    for step in range(1, reach + 1):
        start = start[(start + step < len(order)) & (copies[start] < COPIES)]
        start = start[key[order[start]] == key[order[start + step]]]  # after the last row of a key there are no more
        if not len(start):
            break
        a, b = order[start], order[start + step]
        close = np.bitwise_count(hashes[a] ^ hashes[b]) <= NEAR
        if alike is not None:
            close[close] = alike(a[close], b[close])
        copies[start[close]] += 1
        found.append(np.sort(np.stack([a[close], b[close]], 1), 1))
    return np.concatenate(found)


def _small(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(image).convert("L").resize((SMALL, SMALL), Image.Resampling.BOX))
