"""Packing: decode every image once and write its pixels where `unfreeze.data.packed` reads them."""

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from unfreeze.data.decoding import BrokenImage, UnknownGreyRange, decode, resize_shorter
from unfreeze.data.duplicates import find_duplicates
from unfreeze.data.folders import named
from unfreeze.data.greys import look_at_greys
from unfreeze.data.packed import NUMBERS, Greys, PackedImages, packed_images
from unfreeze.data.splits import assign_splits
from unfreeze.errors import UserError
from unfreeze.parallel import in_order
from unfreeze.persistence.atomic import sync
from unfreeze.persistence.resumable import ResumableFile
from unfreeze.progress import track
from unfreeze.settings.schema import Data

logger = logging.getLogger("unfreeze")

Row = dict[str, Any]
Decoded = tuple[Row, bytes, list[int] | None]

SET_ASIDE = dict.fromkeys((*NUMBERS, "digest", "difference_hash", "remark"), "")
"""Columns of `images.csv` that are empty for an image that could not be read."""
AHEAD = 4
"""Images in memory at once while packing, times the number of cores."""
SAME = 1e-3
"""Largest difference of two means of grey values (0 to 255) that rounding may cause."""
SHAPE = 1.4
"""Long side over short side of an average photograph, to estimate the disk space for the pixels."""


def pack(
    table: pd.DataFrame, folder: Path, data: Data, seed: int, pixels: ResumableFile | None = None
) -> dict[str, float]:
    """Decode, resize, split and pack the images of a source; set aside what cannot be read.

    Args:
        table: as `unfreeze.data.sources.read_source` gives it.
        folder: output folder; no file has its final name before all of them are complete.
        data: settings of packing and splitting.
        seed: of the splits.
        pixels: file for the pixels while packing is not complete, perhaps with pixels that an interrupted process has
            written. Without it, they are written to the folder, and removed after an interruption.

    Returns:
        Metrics: numbers of images, broken images, classes, and images per split.

    Raises:
        UserError: too many broken images, too few images in a class, no space on the disk, or no right to write there.
    """
    partial = {name: folder / f"{name}.partial" for name in ("images.csv", "dataset.json")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)
        with pixels or ResumableFile(folder / "pixels.bin.partial", "", math.inf) as file:
            # A first split that ignores duplicates: classes that cannot be split are refused before hours of decoding.
            assign_splits(table.assign(digest=""), data.valid, data.test, seed)
            _check_space(file, folder, len(table), data.image_size)
            rows, greys = _pack_pixels(table, file, data)
            found = pd.concat([table.drop(columns="file").reset_index(drop=True), pd.DataFrame(rows)], axis=1)
            good = found["reason"] == ""
            _check_classes(found, good)
            classes = sorted(found.loc[good, "label"].unique())
            pairs = []
            if data.near_duplicates == "group":
                file.keep()  # flushes the last pixels to the file, which is read next
                pairs = _near_duplicates(packed_images(file.path, found[good], data.image_size, classes))
            split = assign_splits(found[good], data.valid, data.test, seed, pairs)
            found["split"] = split.reindex(found.index, fill_value="")
            about = {
                "classes": classes,
                "image_size": data.image_size,
                "source": data.source,
                "fingerprint": _fingerprint(found[good]),
                "greys": None if greys is None else asdict(greys),
                "notes": table.attrs.get("notes", []),
            }
            partial["images.csv"].write_bytes(found.to_csv(index=False, lineterminator="\n").encode())
            partial["dataset.json"].write_bytes((json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode())
            for whole in partial.values():
                sync(whole)
            file.put(folder / "pixels.bin")
        for name, whole in partial.items():
            os.replace(whole, folder / name)
        sync(folder)
    except OSError as error:
        raise UserError(
            f"The packed pixels could not be written to {folder.absolute()}: {error.strerror}. Make space, or check "
            "the write permissions."
        ) from None
    finally:
        _clear(folder)
    for remark, count in found.loc[found["remark"] != "", "remark"].value_counts().items():
        logger.info("%d images are %s", count, remark)
    counts = found.loc[good, "split"].value_counts()
    splits = {split: int(counts.get(split, 0)) for split in ("train", "valid", "test")}
    return {"images": int(good.sum()), "broken": int((~good).sum()), "classes": len(classes), **splits}


def _pack_pixels(table: pd.DataFrame, file: ResumableFile, data: Data) -> tuple[list[Row], Greys | None]:
    """Write all pixels.

    At the first image with greys of more than 8 bits, all images are scanned for the range of values, or a sample of
    them if data.grey_range gives the range. Without such images, each image is read once.

    Returns:
        A row for each image, in the table's order, and the greys of more than 8 bits, if there are any.
    """
    files = list(table["file"])
    greys = look_at_greys(files, data) if any(note["grey_range"] for note in file.notes) else None
    _keep_unchanged(table, file, _scaled(data, greys))
    while len(file.notes) < len(table):
        try:
            _write_pixels(table, file, _scaled(data, greys))
        except UnknownGreyRange:
            greys = look_at_greys(files, data)
    if greys is None and not isinstance(data.grey_range, str):  # images to be predicted may have such greys
        greys = Greys(data.grey_range, 0, data.grey_range, [])
    return [note["row"] for note in file.notes], greys


def _scaled(data: Data, greys: Greys | None) -> Data:
    """The settings with the range of greys, or ``auto`` if it is not known yet."""
    return replace(data, grey_range=greys.range if greys else "auto")


def _write_pixels(table: pd.DataFrame, file: ResumableFile, data: Data) -> None:
    """Write the pixels of the images that are not in the file yet. Raises UnknownGreyRange if an image needs it."""
    kept = file.notes
    broken = [f"{note['path']}: {note['row']['reason']}" for note in kept if note["row"]["reason"]]
    left = table[len(kept) :]
    for path, (row, pixels, stamp) in zip(
        left["path"], track(_decoded(list(left["file"]), data), "decoding", len(left)), strict=True
    ):
        if row["reason"]:
            broken.append(f"{path}: {row['reason']}")
            if len(broken) > data.max_broken * len(table):
                raise UserError(
                    f"data.source: more than {data.max_broken:.0%} of the {len(table)} images in {data.source} cannot be "
                    "read (data.max_broken), among them\n  " + "\n  ".join(broken[:5])
                )
        else:
            row["offset"] = file.size
        file.append(pixels, {"path": path, "stamp": stamp, "row": row, "grey_range": _known_range(data)})


def _known_range(data: Data) -> list[float] | None:
    return None if isinstance(data.grey_range, str) else list(data.grey_range)


def _near_duplicates(packed: PackedImages) -> list[tuple[int, int]]:
    """Pairs of row numbers of images that are nearly the same."""
    pairs = find_duplicates(packed)
    return list(pairs.loc[pairs["kind"] == "near", ["row_a", "row_b"]].itertuples(index=False, name=None))


def _keep_unchanged(table: pd.DataFrame, file: ResumableFile, data: Data) -> None:
    """Keep the packed images before the first one that would be packed differently now, and discard the rest."""

    def same(note: dict[str, Any], path: str, name: str) -> bool:
        if note["path"] != path or note["stamp"] != _stamp(name):
            return False
        if note["grey_range"] not in (None, _known_range(data)):
            return False
        # Images that could not be read are tried again: the cause may have been temporary, or fixed since.
        try:
            return not note["row"]["reason"] or _read(name, data)[0] == note["row"]
        except UnknownGreyRange:
            return False

    notes = file.notes
    count = sum(
        1 for _ in takewhile(lambda image: same(*image), zip(notes, table["path"], table["file"], strict=False))
    )
    if count < len(notes):
        file.cut(count)
    if count:
        logger.info("%d of %d images were packed before an interruption", count, len(table))


def stamps(table: pd.DataFrame) -> list[list[int] | None]:
    """The `_stamp` of each file in a source's table, in order."""
    return [_stamp(file) for file in table["file"]]


def _stamp(file: str) -> list[int] | None:
    """Size in bytes, mtime and ctime in ns, to detect that a file has changed; None if it cannot be examined."""
    try:
        found = os.stat(file)
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _decoded(files: list[str], data: Data) -> Iterator[Decoded]:
    """Rows, pixels and stamps of images in their order, computed a few images ahead."""
    return in_order(lambda file: _read(file, data), files, AHEAD)


def _read(file: str, data: Data) -> Decoded:
    """An image's values for `images.csv`, its packed pixels, and its file's stamp from before it was read."""
    stamp = _stamp(file)
    grey_range = None if isinstance(data.grey_range, str) else data.grey_range
    try:
        (width, height), image = decode(file, data.max_megapixels, data.image_size, grey_range)
    except UnknownGreyRange:
        raise
    except BrokenImage as error:
        return {**SET_ASIDE, "reason": str(error)}, b"", stamp
    fine = image.info.get("greys", image)  # images with different greys are different, even if they are shown alike
    digest = hashlib.blake2b(fine.tobytes(), digest_size=16, key=f"{image.size}".encode()).hexdigest()
    small = resize_shorter(image, data.image_size)
    row = {
        "width": width,
        "height": height,
        "packed_width": small.width,
        "packed_height": small.height,
        "offset": 0,
        "digest": digest,
        "difference_hash": difference_hash(small if fine is image else fine),
        "remark": image.info.get("remark", ""),
        "reason": "",
    }
    return row, small.tobytes(), stamp


def difference_hash(image: Image.Image) -> str:
    """Difference hash of an image (Krawetz's dHash, 2013), 64 bits as hex.

    Each bit says whether a cell is darker than its right neighbour, in 8 rows of 9 cells. The hash hardly changes when
    the image is resized or saved again.
    """
    grey = image if image.mode == "F" else image.convert("L")
    cells = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), float)
    return np.packbits(cells[:, 1:] > cells[:, :-1] + SAME).tobytes().hex()


def _fingerprint(table: pd.DataFrame) -> str:
    """Hash of the data set: the paths, pixels, labels and splits of its images."""
    lines = sorted("\t".join(row) for row in table[["path", "label", "split", "digest"]].itertuples(index=False))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _check_classes(found: pd.DataFrame, good: pd.Series) -> None:
    empty = sorted(set(found["label"]) - set(found.loc[good, "label"]))
    if empty:
        raise UserError(f"data.source: of the class{'es' * (len(empty) > 1)} {named(empty)} no image could be read.")


def _check_space(file: ResumableFile, folder: Path, images: int, image_size: int) -> None:
    """Raise a UserError if the pixels do not fit on the disk of the unfinished file, or on that of the final folder."""
    whole = int(images * image_size * image_size * 3 * SHAPE)
    elsewhere = file.path.stat().st_dev != folder.stat().st_dev
    for where, needed in ((file.path.parent, whole - file.size), (folder, whole if elsewhere else 0)):
        free = shutil.disk_usage(where).free
        if needed > free:
            raise UserError(
                f"The packed pixels of {images} images take about {needed / 1e9:.1f} GB in {where.absolute()}, where "
                f"{free / 1e9:.1f} GB are free: make space, or choose a smaller data.image_size."
            )


def _clear(folder: Path) -> None:
    """Remove unfinished files."""
    for left in folder.glob("*.partial*"):
        with contextlib.suppress(OSError):
            left.unlink()
