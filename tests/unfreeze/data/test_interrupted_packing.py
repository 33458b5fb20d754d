"""An interrupted packing is resumed, and ends like a packing without interruption."""

import itertools
import os
import shutil
from pathlib import Path

import pytest

from tests.unfreeze.data.test_packed import data, draw_photos, noise
from unfreeze.data import packing
from unfreeze.data.packing import pack
from unfreeze.data.sources import read_source
from unfreeze.persistence.interruption import Interrupted
from unfreeze.persistence.resumable import ResumableFile
from unfreeze.settings.schema import Data


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return draw_photos(tmp_path / "photos")


def interrupted(photos: Path, monkeypatch: pytest.MonkeyPatch, after: int, unread: str = "") -> ResumableFile:
    """Interrupt a packing after some images; returns its state. ``unread`` is an image that cannot be read."""
    usual, seen = packing._read, itertools.count()

    def read(file: str, data: Data) -> packing.Decoded:
        if next(seen) >= after:
            raise Interrupted
        if file == unread:
            return {**packing.SET_ASIDE, "reason": "Input/output error"}, b"", packing._stamp(file)
        return usual(file, data)

    monkeypatch.setattr(packing, "_read", read)
    monkeypatch.setattr(packing, "AHEAD", 1)
    scratch = photos.parent / "scratch/pixels.bin"
    with pytest.raises(Interrupted):
        pack(read_source(str(photos)), photos.parent / "out", data(photos), 0, ResumableFile(scratch, "a", 1000))
    assert not os.listdir(photos.parent / "out")
    monkeypatch.setattr(packing, "_read", usual)
    return ResumableFile(scratch, "a", 1000)


def same_as_never_interrupted(photos: Path, pixels: ResumableFile) -> None:
    pack(read_source(str(photos)), photos.parent / "out", data(photos), 0, pixels)
    pack(read_source(str(photos)), photos.parent / "anew", data(photos), 0)
    for name in ("pixels.bin", "images.csv", "dataset.json"):
        assert (photos.parent / "out" / name).read_bytes() == (photos.parent / "anew" / name).read_bytes()
    assert sorted(os.listdir(photos.parent / "out")) == ["dataset.json", "images.csv", "pixels.bin"]


def test_a_packing_that_dvc_had_not_taken_yet_is_not_done_again(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch, out = photos.parent / "scratch/pixels.bin", photos.parent / "out"
    pack(read_source(str(photos)), out, data(photos), 0, ResumableFile(scratch, "a", 1000))
    shutil.rmtree(out)  # as DVC does before it runs the step again
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_read", None)
        pack(read_source(str(photos)), out, data(photos), 0, ResumableFile(scratch, "a", 1000))
    same_as_never_interrupted(photos, ResumableFile(scratch, "a", 1000))


@pytest.mark.parametrize("after", [1, 5, 20])
def test_an_interrupted_packing_is_gone_on_with(photos: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    (photos / "cat/0.png").write_bytes(b"no image")
    pixels = interrupted(photos, monkeypatch, min(after, 19))
    kept = len(pixels.notes)
    assert 0 < kept <= after
    read: list[str] = []
    usual = packing._read
    monkeypatch.setattr(packing, "_read", lambda file, data: (read.append(file), usual(file, data))[1])
    same_as_never_interrupted(photos, pixels)
    assert len(read) == 20 - kept + 1 + 20  # the first image is unreadable, and read again


def test_what_could_not_be_read_is_tried_again(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = interrupted(photos, monkeypatch, 12, read_source(str(photos))["file"].iloc[2])
    assert [bool(note["row"]["reason"]) for note in pixels.notes[:4]] == [False, False, True, False]
    same_as_never_interrupted(photos, pixels)


@pytest.mark.parametrize("what", ["changed", "gone", "more"])
def test_images_that_changed_meanwhile_are_read_anew(photos: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    pixels = interrupted(photos, monkeypatch, 12)
    count = len(pixels.notes)
    first = read_source(str(photos))["file"].iloc[2]
    if what == "changed":
        noise(99).save(first)
    elif what == "gone":
        os.remove(first)
    else:
        noise(99).save(first.replace(".png", " again.png"))
    assert count > 3
    same_as_never_interrupted(photos, pixels)
