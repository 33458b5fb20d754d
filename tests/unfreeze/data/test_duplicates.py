"""Duplicate images, compared with a search over all pairs."""

import hashlib
import itertools

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from unfreeze.data.duplicates import DIFFERENCE, FLAT, NEAR, find_duplicates
from unfreeze.data.packed import PackedImages, in_memory
from unfreeze.data.packing import difference_hash

SIZE = 32


def test_the_difference_hash_is_brightness_from_cell_to_cell() -> None:
    cells = np.random.default_rng(3).integers(0, 256, (8, 9), np.uint8)
    bits = "".join("1" if cells[y, x + 1] > cells[y, x] else "0" for y in range(8) for x in range(8))
    image = Image.fromarray(np.kron(cells, np.ones((4, 5), np.uint8)))
    assert difference_hash(image) == f"{int(bits, 2):016x}"


def gallery(seed: int, count: int = 60) -> PackedImages:
    """Smooth images, some of them in several versions, with the table of packed images."""
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        base = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        pictures.append(base)
        for _ in range(rng.integers(0, 3)):
            change = rng.normal(0, rng.choice([0, 1.5, 3]), (SIZE, SIZE, 3))
            pictures.append(Image.fromarray((np.asarray(base) + change).clip(0, 255).astype(np.uint8)))
    table = pd.DataFrame(
        {
            "digest": [hashlib.md5(p.tobytes()).hexdigest() for p in pictures],
            "difference_hash": [difference_hash(p) for p in pictures],
            "split": rng.choice(["train", "valid"], len(pictures)),
            "label": rng.choice(["a", "b"], len(pictures), p=[0.9, 0.1]),
        }
    )
    pixels = np.concatenate([np.asarray(p).reshape(-1) for p in pictures])
    n = len(pictures)
    return PackedImages(
        in_memory(pixels),
        table,
        ["a", "b"],
        np.zeros(n, int),
        np.full((n, 2), SIZE),
        np.arange(n) * SIZE**2 * 3,
        SIZE,
    )


@pytest.mark.parametrize("seed", range(4))
def test_duplicates_are_those_that_comparing_all_pairs_finds(seed: int) -> None:
    images = gallery(seed)
    table = images.table
    hashes = [int(text, 16) for text in table["difference_hash"]]
    small = [
        np.asarray(Image.fromarray(images[i]).convert("L").resize((32, 32), Image.Resampling.BOX), float)
        for i in range(len(images))
    ]
    expected = {}
    for a, b in itertools.combinations(range(len(images)), 2):
        if table["digest"][a] == table["digest"][b]:
            expected[a, b] = "exact"
        elif (
            (hashes[a] ^ hashes[b]).bit_count() <= NEAR
            and all(FLAT <= hashes[i].bit_count() <= 64 - FLAT for i in (a, b))
            and np.abs(small[a] - small[b]).mean() <= DIFFERENCE
        ):
            expected[a, b] = "near"
    found = find_duplicates(images)
    assert dict(zip(zip(found["row_a"], found["row_b"], strict=True), found["kind"], strict=True)) == expected
    assert {"exact", "near"} == set(expected.values())
    first, second = (table.loc[found[name].to_list()].reset_index() for name in ("row_a", "row_b"))
    assert found["leak"].equals(first["split"] != second["split"])
    assert found["conflict"].equals(first["label"] != second["label"])
    assert found["conflict"].is_monotonic_decreasing and found["conflict"].any()


def test_a_thousand_images_that_are_nearly_the_same_do_not_make_half_a_million_pairs() -> None:
    one, n = gallery(0, 1), 1000
    base = one[0].astype(int)
    pictures = [
        (base + np.random.default_rng(i).integers(-1, 2, base.shape)).clip(0, 255).astype(np.uint8) for i in range(n)
    ]
    table = pd.concat([one.table.iloc[:1]] * n, ignore_index=True).assign(
        digest=[str(i) for i in range(n)], difference_hash=[difference_hash(Image.fromarray(p)) for p in pictures]
    )
    pixels = in_memory(np.concatenate([p.reshape(-1) for p in pictures]))
    places = np.arange(n) * SIZE**2 * 3
    images = PackedImages(pixels, table, one.classes, np.zeros(n, int), np.full((n, 2), SIZE), places, SIZE)
    found = find_duplicates(images)
    assert set(found["kind"]) == {"near"} and n / 2 <= len(found) <= 3 * 20 * n


def test_a_thousand_copies_do_not_make_half_a_million_pairs() -> None:
    one = gallery(0, 1)
    n = 1000
    table = pd.concat([one.table.iloc[:1]] * n, ignore_index=True)
    copies = PackedImages(one.read, table, one.classes, np.zeros(n, int), np.full((n, 2), SIZE), np.zeros(n, int), SIZE)
    found = find_duplicates(copies)
    assert set(found["kind"]) == {"exact"} and n - 1 <= len(found) <= 20 * n
    assert set(found["row_a"]) | set(found["row_b"]) == set(range(n))
