"""Images that are in a data set twice: exactly, or nearly (resized, saved anew)."""

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
SMALL = 32
"""Side in pixels at which images are compared."""
COPIES = 20
"""Copies of an image that each is paired with: a thousand copies need not make half a million pairs."""
REACH = 2000
"""Images with a part of their hash in common that each is compared with."""

Rows = NDArray[np.int64]


def find_duplicates(packed: PackedImages) -> pd.DataFrame:
    """Pairs of duplicate images.

    Near duplicates are found through the pigeonhole principle: hashes that differ in two bits agree in one of three
    parts, so only images that share a part are compared. Hashes take images of one kind (cells, chest X-rays) for alike,
    so of every pair that they find the pixels are compared as well.

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
    parts = [(some >> np.uint64(shift)) & np.uint64(2**bits - 1) for shift, bits in ((0, 21), (21, 21), (42, 22))]
    pairs = structured[np.unique(np.concatenate([_sharing(part, some, REACH, of) for part in parts]), axis=0)]
    rows, place = np.unique(pairs, return_inverse=True)
    small = np.array([_small(packed[row]) for row in rows]).reshape(-1, SMALL * SMALL)
    first, second = place.reshape(-1, 2).T
    alike = [np.abs(small[a] - small[b]).mean() <= DIFFERENCE for a, b in zip(first, second, strict=True)]
    return pairs[np.array(alike, bool)]


def _sharing(
    key: NDArray[np.generic], hashes: NDArray[np.uint64], reach: int, digest: NDArray[np.generic] | None = None
) -> Rows:
    """Pairs (M, 2) of rows that have the same key, and hashes that differ in at most `NEAR` bits.

    Among rows of one key each is compared with the ``reach`` next ones in the order of their hashes. With ``digest``,
    pairs of the same digest are left out.
    """
    order = np.lexsort((hashes, key))
    found = [np.empty((0, 2), np.int64)]
    start = np.arange(len(order))
    for step in range(1, reach + 1):
        start = start[start + step < len(order)]
        start = start[key[order[start]] == key[order[start + step]]]  # who has no neighbour has none further on
        if not len(start):
            break
        a, b = order[start], order[start + step]
        close = np.bitwise_count(hashes[a] ^ hashes[b]) <= NEAR
        if digest is not None:
            close &= digest[a] != digest[b]
        found.append(np.sort(np.stack([a[close], b[close]], 1), 1))
    return np.concatenate(found)


def _small(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.asarray(Image.fromarray(image).convert("L").resize((SMALL, SMALL), Image.Resampling.BOX), np.float32)
