"""Packing: decode every image once and write its pixels where `unfreeze.packed` reads them."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from unfreeze.decoding import BrokenImage, decode, resize_shorter
from unfreeze.errors import UserError
from unfreeze.progress import track
from unfreeze.settings import Data
from unfreeze.splits import assign_splits

CHUNK = 64
"""Images in memory at once while packing."""


def pack(table: pd.DataFrame, folder: Path, data: Data, seed: int) -> dict[str, float]:
    """Decode, resize, split and pack the images of a source; set aside what cannot be read.

    Args:
        table: as `unfreeze.sources.read_source` gives it.
        folder: where to write; nothing is there under its final name before everything is done.
        data: settings of packing and splitting.
        seed: of the splits.

    Returns:
        Metrics: numbers of images, broken images, classes, and images per split.

    Raises:
        UserError: too many broken images, too few images in a class, or no space on the disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_space(folder, len(table), data.image_size)
    partial = folder / "pixels.bin.partial"
    with partial.open("wb") as file:
        rows = _pack_pixels(table, file, data)
    found = pd.concat([table.drop(columns="file").reset_index(drop=True), pd.DataFrame(rows)], axis=1)
    good = found["reason"] == ""
    _check_classes(found, good)
    found["split"] = assign_splits(found[good], data.valid, data.test, seed).reindex(found.index, fill_value="")

    classes = sorted(found.loc[good, "label"].unique())
    about = {
        "classes": classes,
        "image_size": data.image_size,
        "source": data.source,
        "fingerprint": _fingerprint(found[good]),
    }
    for name, text in (
        ("images.csv", found.to_csv(index=False, lineterminator="\n", float_format="%d")),
        ("dataset.json", json.dumps(about, indent=2, ensure_ascii=False) + "\n"),
    ):
        (folder / f"{name}.partial").write_text(text, encoding="utf-8", errors="surrogateescape")
        os.replace(folder / f"{name}.partial", folder / name)
    os.replace(partial, folder / "pixels.bin")
    counts = found.loc[good, "split"].value_counts()
    splits = {split: int(counts.get(split, 0)) for split in ("train", "valid", "test")}
    return {"images": int(good.sum()), "broken": int((~good).sum()), "classes": len(classes), **splits}


def _pack_pixels(table: pd.DataFrame, file: Any, data: Data) -> list[dict[str, Any]]:
    """Write all pixels; returns a row for each image, in the table's order."""
    rows: list[dict[str, Any]] = []
    offset, broken = 0, []
    for path, (row, pixels) in zip(
        table["path"], track(_decoded(table["file"], data), "decoding", len(table)), strict=True
    ):
        if pixels is None:
            broken.append(f"{path}: {row['reason']}")
            if len(broken) > data.max_broken * len(table):
                raise UserError(
                    f"data.source: more than {data.max_broken:.0%} of the {len(table)} images in {data.source} cannot be "
                    "read (data.max_broken), among them\n  " + "\n  ".join(broken[:5])
                )
        else:
            try:
                file.write(pixels)
            except OSError as error:
                raise UserError(f"The packed pixels could not be written to {file.name}: {error.strerror}.") from None
            row |= {"offset": offset}
            offset += pixels.nbytes
        rows.append(row)
    file.flush()
    os.fsync(file.fileno())
    return rows


def _decoded(files: pd.Series, data: Data) -> Iterator[tuple[dict[str, Any], NDArray[np.uint8] | None]]:
    """Rows and pixels of images, decoded on all cores: Pillow lets go of Python's lock while it works."""
    paths = list(files)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), CHUNK):
            yield from pool.map(lambda path: _read(path, data), paths[start : start + CHUNK])


def _read(path: str, data: Data) -> tuple[dict[str, Any], NDArray[np.uint8] | None]:
    blank = dict.fromkeys(("width", "height", "packed_width", "packed_height", "offset", "digest", "average_hash"), "")
    try:
        size, image = decode(path, data.max_megapixels, data.image_size)
    except BrokenImage as error:
        return {**blank, "reason": str(error)}, None
    digest = hashlib.blake2b(np.asarray(image).tobytes(), digest_size=16, key=f"{image.size}".encode()).hexdigest()
    small = resize_shorter(image, data.image_size)
    pixels = np.ascontiguousarray(small)
    row = {
        "width": size[0],
        "height": size[1],
        "packed_width": small.width,
        "packed_height": small.height,
        "offset": 0,
        "digest": digest,
        "average_hash": difference_hash(small),
        "reason": "",
    }
    return row, pixels


def difference_hash(image: Image.Image) -> str:
    """64 bits, as hex, that stay nearly the same when an image is resized or saved anew: whether it gets brighter from
    each of 8 x 8 cells to the next (Krawetz's dHash, 2013)."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes().hex()


def _fingerprint(table: pd.DataFrame) -> str:
    """A hash of all that the data is: which images, with which pixels, labels and splits."""
    lines = sorted("\t".join(row) for row in table[["path", "label", "split", "digest"]].itertuples(index=False))
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _check_classes(found: pd.DataFrame, good: pd.Series) -> None:
    empty = sorted(set(found["label"]) - set(found.loc[good, "label"]))
    if empty:
        raise UserError(f"data.source: of the class {empty[0]!r} not a single image could be read.")


def _check_space(folder: Path, images: int, image_size: int) -> None:
    needed = int(images * image_size * image_size * 3 * 1.4)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"The packed pixels of {images} images take about {needed / 1e9:.1f} GB in {folder.absolute()}, where "
            f"{free / 1e9:.1f} GB are free: make space, or choose a smaller data.image_size."
        )
