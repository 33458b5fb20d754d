"""Packing and opening: the opened images equal the packed ones, or there is no output."""

import errno
import hashlib
import io
import itertools
import json
import os
import resource
import shutil
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from unfreeze.data import packing
from unfreeze.data.decoding import HIDDEN
from unfreeze.data.duplicates import find_duplicates
from unfreeze.data.packed import PackedImages, open_packed
from unfreeze.data.packing import pack
from unfreeze.data.sources import read_source
from unfreeze.errors import UserError
from unfreeze.reports.explore import explore_report
from unfreeze.settings.schema import Data

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")
SIZE = 32


def data(source: Path, **changes: Any) -> Data:
    usual = {
        "valid": 0.2,
        "test": 0.2,
        "near_duplicates": "group",
        "max_broken": 0.2,
        "max_megapixels": 1,
        "grey_range": "auto",
        "exclude": None,
        "min_images": 1,
    }
    return Data(str(source), SIZE, **{**usual, **changes})


def noise(seed: int, width: int = 40, height: int = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def draw_photos(folder: Path) -> Path:
    """Create twenty images of two classes, whose shorter side already has the packed length."""
    for i in range(20):
        file = folder / ("cat", "dog")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        (noise(i) if i % 3 else noise(i, SIZE, 50)).save(file)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return draw_photos(tmp_path / "photos")


def packed(photos: Path, seed: int = 0, **changes: Any) -> PackedImages:
    folder = photos.parent / f"packed {seed} {changes}"
    pack(read_source(str(photos)), folder, data(photos, **changes), seed)
    return open_packed(folder)


def failing(photos: Path, **changes: Any) -> str:
    """Message of a UserError; checks that no output is left that could be mistaken for a valid one."""
    folder = photos.parent / "failing"
    with pytest.raises(UserError) as caught:
        pack(read_source(str(photos)), folder, data(photos, **changes), 0)
    assert not folder.is_dir() or not os.listdir(folder)
    return str(caught.value)


@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates_are_not_separated_unless_they_are_only_reported(tmp_path: Path, seed: int) -> None:
    """Every image occurs twice, the second time as JPEG. An unreadable image comes before them."""
    photos = tmp_path / "photos"
    for i in range(20):
        (photos / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        smooth = noise(i, 8, 8).resize((64, 64), Image.Resampling.BICUBIC)
        smooth.save(photos / "ab"[i % 2] / f"{i}.png")
        smooth.save(photos / "ab"[i % 2] / f"{i} again.jpg", quality=95)
    (photos / "a" / "0 0.png").write_bytes(b"none")

    def separated(near_duplicates: str) -> int:
        table = packed(photos, seed, near_duplicates=near_duplicates).table
        name = table["path"].str.extract(r"(\d+)[^/]*$")[0]
        assert (table.groupby(name)["split"].size() == 2).all()
        return int((table.groupby(name)["split"].nunique() > 1).sum())

    assert separated("group") == 0
    assert separated("report") > 3


def test_pixels_labels_and_sizes_come_back(photos: Path) -> None:
    images = packed(photos)
    assert len(images) == 20 and images.classes == ["cat", "dog"] and images.image_size == SIZE
    for row in range(20):
        expected = np.asarray(Image.open(photos / images.table["path"][row]))
        np.testing.assert_array_equal(images[row], expected)
        assert images.classes[images.labels[row]] == images.table["label"][row] == images.table["path"][row][:3]
        assert (
            tuple(images.sizes[row])
            == (images.table["width"][row], images.table["height"][row])
            == expected.shape[1::-1]
        )
    parts = [images.rows(name) for name in ("train", "valid", "test")]
    assert [len(part) for part in parts] == [12, 4, 4] and sorted(np.concatenate(parts)) == list(range(20))


def test_a_rectangle_of_an_image_is_read_wherever_it_is_to_be_written(photos: Path) -> None:
    images = packed(photos)
    wide, tall = (int(np.flatnonzero(images.sizes[:, side] > SIZE)[0]) for side in (0, 1))
    for row, low, high in [
        (wide, (0, 0), (40, SIZE)),
        (wide, (3, 5), (35, 30)),
        (tall, (0, 7), (SIZE, 39)),
        (tall, (1, 0), (2, 1)),
    ]:
        (x0, y0), (x1, y1) = low, high
        expected = np.asarray(Image.open(photos / images.table["path"][row]))[y0:y1, x0:x1]
        np.testing.assert_array_equal(images.crop(row, low, high), expected)
        around = np.zeros((2, y1 - y0 + 1, x1 - x0 + 1, 3), np.uint8)
        for out in (np.zeros(expected.shape, np.uint8), around[1, 1:, 1:]):
            assert images.crop(row, low, high, out) is out
            np.testing.assert_array_equal(out, expected)
        assert not around[0].any() and not around[1, 0].any() and not around[1, :, 0].any()


def test_metrics_and_what_is_said_of_the_data(photos: Path) -> None:
    (photos / "cat/broken.png").write_bytes(b"")
    out = photos.parent / "out"
    metrics = pack(read_source(str(photos)), out, data(photos), 0)
    assert metrics == {"images": 20, "broken": 1, "classes": 2, "train": 12, "valid": 4, "test": 4}
    about = json.loads((out / "dataset.json").read_text())
    assert about["classes"] == ["cat", "dog"] and about["image_size"] == SIZE and about["source"] == str(photos)
    assert sorted(os.listdir(out)) == ["dataset.json", "images.csv", "pixels.bin"]


def test_large_images_are_made_small_and_small_ones_large(photos: Path) -> None:
    Image.new("RGB", (300, 200), "red").save(photos / "cat/large.jpg", quality=95)
    Image.new("L", (1, 1), 7).save(photos / "cat/one.png")
    images = packed(photos)
    rows = {path: row for row, path in enumerate(images.table["path"])}
    large, one = rows["cat/large.jpg"], rows["cat/one.png"]
    assert images[large].shape == (SIZE, 48, 3) and images.table["width"][large] == 300
    assert np.abs(images[large].astype(int) - [255, 0, 0]).max() <= 3
    assert images[one].shape == (SIZE, SIZE, 3) and (images[one] == 7).all()


def test_broken_images_are_set_aside_with_a_reason(photos: Path) -> None:
    whole = io.BytesIO()
    noise(99).save(whole, "PNG")
    broken = {
        "dog/cut off.png": (whole.getvalue()[:900], "damaged"),
        "dog/empty.jpg": (b"", "empty file"),
        "dog/page.gif": (b"<html>", "not an image"),
    }
    for name, (content, _) in broken.items():
        (photos / name).write_bytes(content)
    Image.new("1", (1001, 1000)).save(photos / "dog/huge.png")
    (photos / "dog/gone.jpg").symlink_to("nowhere")
    images = packed(photos, max_broken=0.25)
    found = pd.read_csv(
        photos.parent / "packed 0 {'max_broken': 0.25}" / "images.csv", keep_default_na=False, dtype=str
    )
    assert len(found) == 25 and len(images) == 20
    reasons = found.set_index("path")["reason"]
    expected = {name: reason for name, (_, reason) in broken.items()} | {
        "dog/huge.png": "1001 x 1000",
        "dog/gone.jpg": "cannot be read",
    }
    for name, reason in expected.items():
        assert reason in reasons[name]
    aside = found[found["reason"] != ""]
    assert set(aside["path"]) == set(expected) and (aside[["split", "offset", "digest"]] == "").all(axis=None)
    for row in range(20):  # offsets are right although some images in between have no offset
        np.testing.assert_array_equal(images[row], np.asarray(Image.open(photos / images.table["path"][row])))


def test_the_share_of_broken_images_is_limited(photos: Path) -> None:
    for i in range(5):
        (photos / f"cat/b{i}.jpg").write_bytes(b"<html>")
    message = failing(photos, max_broken=0.15)
    assert "15%" in message and "data.max_broken" in message and "cat/b0.jpg: not an image" in message
    assert len(packed(photos, max_broken=0.2)) == 20


def test_a_class_of_which_nothing_could_be_read_is_named(photos: Path) -> None:
    (photos / "bird").mkdir()
    for i in range(4):
        (photos / f"bird/{i}.png").write_bytes(b"nothing")
    assert "'bird'" in failing(photos, max_broken=0.5)


def test_too_few_images_are_refused_before_anything_is_decoded(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "rare").mkdir()
    for i in range(2):
        noise(i).save(photos / f"rare/{i}.png")
    monkeypatch.setattr(packing, "_read", lambda *_: pytest.fail("decoded"))
    assert "'rare'" in failing(photos)


def test_copies_count_as_one_image(photos: Path) -> None:
    (photos / "rare").mkdir()
    for i in range(6):
        noise(0).save(photos / f"rare/{i}.png", compress_level=i)
    assert "'rare'" in failing(photos)


def test_the_same_input_gives_the_same_files(photos: Path) -> None:
    first, again, other = packed(photos), packed(photos, max_broken=0.3), packed(photos, seed=1)
    pd.testing.assert_frame_equal(first.table, again.table)
    assert all(np.array_equal(first[row], again[row]) for row in range(len(first)))
    assert not first.table["split"].equals(other.table["split"])


def test_the_fingerprint_is_that_of_images_labels_and_splits(photos: Path) -> None:
    def fingerprint(seed: int = 0) -> str:
        out = photos.parent / "out"
        shutil.rmtree(out, ignore_errors=True)
        pack(read_source(str(photos)), out, data(photos), seed)
        return str(json.loads((out / "dataset.json").read_text())["fingerprint"])

    first = fingerprint()
    image = Image.open(photos / "cat/0.png")
    image.save(photos / "cat/0.png", compress_level=1, pnginfo=None)
    (photos / "cat/broken.png").write_bytes(b"")
    assert fingerprint() == first  # other bytes, the same pixels
    prints = {first, fingerprint(1)}
    pixels = np.array(image)
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(photos / "cat/0.png")
    prints.add(fingerprint())
    (photos / "cat/0.png").rename(photos / "dog/0.png")
    prints.add(fingerprint())
    (photos / "dog/0.png").unlink()
    prints.add(fingerprint())
    assert len(prints) == 5


def test_names_and_labels_of_every_kind_come_back(tmp_path: Path) -> None:
    labels = ["007", "1e5", "NA", "true", 'a,"b"', "ü 🐈", " x", "line\nfeed", "-", "=1+1"]
    for number, label in enumerate(labels):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (40, 40), (number * 20, i * 100, 0)).save(tmp_path / "photos" / label / f"{i};,\n'\".png")
    raw = os.fsencode(tmp_path) + b"/photos/caf\xe9"
    os.mkdir(raw)
    for i in range(3):
        with open(raw + b"/\xff%d.png" % i, "wb") as file:
            Image.new("RGB", (40, 40), (i, i, 255)).save(file, "PNG")
    images = packed(tmp_path / "photos")
    assert images.classes == sorted([*labels, "caf\\udce9"])
    assert counted(images.table["label"]) == {label: 3 for label in images.classes}
    for row, path in enumerate(images.table["path"]):
        assert path.rsplit("/", 1)[0] == images.table["label"][row]
    # All images are flat. Their hashes look like numbers if the file is read without column types.
    assert set(images.table["difference_hash"]) == {"0" * 16} and find_duplicates(images).empty


def counted(values: pd.Series) -> dict[str, int]:
    return {str(key): int(count) for key, count in values.value_counts().items()}


def test_nothing_is_there_after_an_interruption(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, out = packing._read, photos.parent / "out"

    def interrupted(file: str, settings: Data) -> tuple[dict[str, object], bytes]:
        if file.endswith("/15.png"):
            raise KeyboardInterrupt
        return read(file, settings)

    monkeypatch.setattr(packing, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(read_source(str(photos)), out, data(photos), 0)
    assert os.listdir(out) == []
    with pytest.raises(UserError, match="ingest"):
        open_packed(out)


def test_what_was_packed_before_stays_until_the_new_is_whole(photos: Path) -> None:
    images, out = packed(photos), photos.parent / "packed 0 {}"
    before = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in out.iterdir()}
    for i in range(10):
        (photos / f"cat/b{i}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="max_broken"):
        pack(read_source(str(photos)), out, data(photos), 0)
    assert {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in out.iterdir()} == before
    assert len(images) == 20


def test_pixels_that_do_not_belong_to_the_table_are_refused(photos: Path) -> None:
    packed(photos)
    out = photos.parent / "packed 0 {}"
    with (out / "pixels.bin").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match="ingest again"):
        open_packed(out)


def test_pixels_that_are_cut_short_while_they_are_read_are_refused(photos: Path) -> None:
    images = packed(photos)
    whole = images[len(images) - 1]
    os.truncate(photos.parent / "packed 0 {}" / "pixels.bin", images.offsets[-1] + whole.size - 1)
    np.testing.assert_array_equal(images[0], np.asarray(Image.open(photos / images.table["path"][0])))
    with pytest.raises(UserError, match=r"pixels\.bin has been cut short: run the step ingest again"):
        images[len(images) - 1]


def test_no_space_is_said_before_anything_is_decoded(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9, 20 * SIZE * SIZE * 3))
    monkeypatch.setattr(packing, "_read", lambda *_: pytest.fail("decoded"))
    message = failing(photos)
    assert str(photos.parent / "failing") in message and "GB are free" in message and "data.image_size" in message


def test_a_disk_that_fills_up_is_said_in_a_sentence(photos: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # the kernel refuses to write more to a file
    try:
        message = failing(photos)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.strerror(errno.EFBIG) in message and str(photos.parent / "failing") in message


@pytest.mark.parametrize("written", [0, 1, 2])
def test_whichever_file_does_not_fit_none_is_left(photos: Path, monkeypatch: pytest.MonkeyPatch, written: int) -> None:
    calls = itertools.count()

    def full(_: int) -> None:
        if next(calls) == written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert os.strerror(errno.ENOSPC) in failing(photos)


def test_a_folder_that_cannot_be_made_is_named(photos: Path) -> None:
    out = photos / "cat/0.png/out"
    with pytest.raises(UserError, match=r"could not be written.*0\.png"):
        pack(read_source(str(photos)), out, data(photos), 0)


def test_memory_does_not_grow_with_the_number_of_images(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, lock = itertools.count(), threading.Lock()
    latest = 0

    def read(file: str, settings: Data) -> tuple[dict[str, object], bytes]:
        nonlocal latest
        with lock:
            latest = next(begun)
        return {"file": file}, b""

    monkeypatch.setattr(packing, "_read", read)
    files = [str(i) for i in range(2000)]
    taken = []
    for row, _ in packing._decoded(files, data(photos)):
        taken.append(row["file"])
        assert latest - len(taken) <= packing.AHEAD * len(os.sched_getaffinity(0))
    assert taken == files


def test_the_sample_is_packed_whole(tmp_path: Path) -> None:
    table = read_source("sample:elpv").groupby("label").head(20).reset_index(drop=True)
    metrics = pack(table, tmp_path, data(Path("sample:elpv")), 0)
    assert metrics["images"] == 40 and metrics["broken"] == 0
    images = open_packed(tmp_path)
    assert images[0].shape == (SIZE, SIZE, 3) and images[0].std() > 5


def test_images_that_their_transparency_hides_are_shown_and_listed(photos: Path) -> None:
    for i in range(0, 20, 3):
        file = photos / ("cat", "dog")[i % 2] / f"{i}.png"
        image = Image.open(file)
        image.putalpha(0)
        image.save(file)
    images = packed(photos)
    assert find_duplicates(images).empty
    hidden = images.table[images.table["remark"] != ""]
    assert len(hidden) == 7 and set(hidden["remark"]) == {HIDDEN}
    for row in range(20):
        np.testing.assert_array_equal(
            images[row], np.asarray(Image.open(photos / images.table["path"][row]).convert("RGB"))
        )
    report = explore_report(images, images.table, find_duplicates(images), "photos")
    assert f"7 images are {HIDDEN}." in report and report.count(HIDDEN) == 1 + 7
