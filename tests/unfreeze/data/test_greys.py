"""Greys of more than 8 bits: one scale for the whole data set, computed from all its images, and used everywhere."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.unfreeze.data.test_interrupted_packing import interrupted, same_as_never_interrupted
from tests.unfreeze.data.test_packed import data, draw_photos, noise
from unfreeze.data import decoding, greys, packing
from unfreeze.data.duplicates import find_duplicates
from unfreeze.data.packed import PackedImages, open_packed
from unfreeze.data.packing import pack
from unfreeze.data.sources import read_source
from unfreeze.persistence.resumable import ResumableFile
from unfreeze.reports import explore

SIDE, COUNT = 96, 16


def slices(spot: bool) -> list[np.ndarray]:
    """Slices (SIDE, SIDE) in Hounsfield units: soft tissue in air or water, with a bright spot or without."""
    rng = np.random.default_rng(spot)
    y, x = np.mgrid[:SIDE, :SIDE]
    made = []
    for i in range(COUNT):
        outside = 5 if i % 2 else -1000
        units = np.where((x - 48) ** 2 + (y - 48) ** 2 < 40**2, rng.normal(60, 15, (SIDE, SIDE)), outside)
        cx, cy = rng.integers(30, 66, 2)
        made.append(np.where(spot & ((x - cx) ** 2 + (y - cy) ** 2 < 64), 160, units).round())
    return made


def signed_tiff(values: np.ndarray) -> bytes:
    """A TIFF of signed 16-bit greys, built exactly by its specification, because Pillow cannot write it."""
    content = values.astype("<i2").tobytes()
    tags = [(256, 4, SIDE), (257, 4, SIDE), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 4, SIDE),
            (279, 4, len(content)), (339, 3, 2)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(content)) + content + struct.pack("<H", len(tags)) + entries + bytes(4)


def write(folder: Path, variant: str) -> Path:
    """Write two classes of slices like a scanner's export. As in real sets, some signed slices have no value < 0."""
    for spot in (False, True):
        (folder / ("lesion" if spot else "none")).mkdir(parents=True)
        for i, units in enumerate(slices(spot)):
            file = folder / ("lesion" if spot else "none") / f"{i:02}.png"
            if variant == "signed":
                file.with_suffix(".tif").write_bytes(signed_tiff(units.clip(0) if i % 2 else units))
            elif variant == "real":
                Image.fromarray((units / 3000).astype(np.float32)).save(file.with_suffix(".tif"))
            else:
                whole = units + 32768 if variant == "offset" else (units + 1024).clip(0, 4095)
                Image.fromarray(whole.astype(np.uint16)).save(file)
    return folder


def packed(source: Path, **changes: Any) -> PackedImages:
    out = source.parent / f"packed {changes}"
    pack(read_source(str(source)), out, data(source, **changes), 0)
    return open_packed(out)


@pytest.mark.parametrize(
    ("variant", "scale", "offset"), [("offset", 1, 32768), ("twelve", 1, 1024), ("signed", 1, 0), ("real", 1 / 3000, 0)]
)
def test_slices_keep_their_contrast_and_are_no_duplicates(
    tmp_path: Path, variant: str, scale: float, offset: int
) -> None:
    images = packed(write(tmp_path / "slices", variant))
    assert find_duplicates(images).empty and len(images) == 2 * COUNT
    assert images.greys is not None and images.greys.images == 2 * COUNT
    assert images.grey_range == pytest.approx([-1000 * scale + offset, 160 * scale + offset])
    assert images.greys.found == images.grey_range and sum(images.greys.counts) == 2 * COUNT * SIDE * SIDE
    dark = images[int(np.flatnonzero(images.table["path"].str.startswith("none/00"))[0])]
    assert dark[0, 0].tolist() == [0, 0, 0] and abs(dark[16, 16, 0] - 255 * 1060 / 1160) < 4


def test_a_range_that_is_given_stands_and_is_kept_where_no_image_has_such_greys(tmp_path: Path) -> None:
    images = packed(write(tmp_path / "slices", "twelve"), grey_range=(1000.0, 1200.0))
    assert images.grey_range == (1000, 1200)
    assert images.greys is not None and images.greys.found == (24, 1184) and images.greys.images == 2 * COUNT
    assert len(set(images[0][16].ravel().tolist())) > 10
    assert find_duplicates(images).query("kind == 'exact'").empty  # clipped values differ in the files
    photos = packed(draw_photos(tmp_path / "photos"), grey_range=(0.0, 4095.0))
    assert photos.grey_range == (0, 4095)


def test_images_without_such_greys_are_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos, opened, usual = draw_photos(tmp_path / "photos"), [], decoding._open
    monkeypatch.setattr(decoding, "_open", lambda file, size: (opened.append(file), usual(file, size))[1])
    monkeypatch.setattr(greys, "raw_greys", lambda *_: pytest.fail("looked at"))
    assert packed(photos).greys is None
    assert sorted(opened) == sorted(read_source(str(photos))["file"])
    assert json.loads((tmp_path / "packed {}/dataset.json").read_text())["greys"] is None


def test_other_images_beside_them_are_packed_as_ever(tmp_path: Path) -> None:
    photos = draw_photos(tmp_path / "photos")
    before = packed(photos)
    pixels = {path: before[row] for row, path in enumerate(before.table["path"])}
    for i, units in enumerate(slices(True)[:2]):
        Image.fromarray((units + 1024).astype(np.uint16)).save(photos / f"dog/a slice {i}.png")
    (photos / "dog/b.png").write_bytes((photos / "dog/a slice 0.png").read_bytes()[:500])
    after = packed(photos, max_broken=0.3)
    assert after.greys is not None and after.greys.images == 2
    for row, path in enumerate(after.table["path"]):
        if path in pixels:
            np.testing.assert_array_equal(after[row], pixels[path])


@pytest.mark.parametrize("changed", [False, True])
def test_an_interrupted_packing_goes_on_with_the_range_as_it_is_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    photos = write(tmp_path / "photos", "twelve")
    noise(1).save(photos / "lesion/0 first.png")
    pixels = interrupted(photos, monkeypatch, 12)
    assert len(pixels.notes) > 4
    if changed:  # then the range is different
        Image.fromarray(np.full((SIDE, SIDE), 4095, np.uint16)).save(photos / "none/15.png")
    reads: list[str] = []
    usual = packing._read
    monkeypatch.setattr(packing, "_read", lambda file, data: (reads.append(file), usual(file, data))[1])
    kept = list(read_source(str(photos))["file"][: len(pixels.notes)])
    pack(read_source(str(photos)), tmp_path / "out", data(photos), 0, pixels)
    assert [file for file in kept if file not in reads] == (kept[:1] if changed else kept)
    same_as_never_interrupted(photos, ResumableFile(tmp_path / "scratch/pixels.bin", "a", 1000))


def test_a_few_odd_pixels_that_take_the_range_are_told(tmp_path: Path) -> None:
    source = write(tmp_path / "slices", "twelve")
    fine = packed(source)
    values = np.array(Image.open(source / "none/00.png"))
    values[0, 0] = 65535
    Image.fromarray(values).save(source / "none/00.png")
    spoilt = packed(source, max_broken=0.3)
    assert explore._levels(fine.greys) > explore.FEW_LEVELS
    report = explore.explore_report(spoilt, spoilt.table, find_duplicates(spoilt), "slices")
    assert "set data.grey_range to [low, high] of the relevant values" in report
    assert "histogram of the greys" in report
    assert "24 is shown as black and 65535 as white" in report
