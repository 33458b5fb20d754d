"""All images of the corpus, and fuzzed copies: each is read like the reference, or skipped with a reason.

To run more fuzzing: ``FUZZ=20000 pytest tests/unfreeze/data/test_bad_images.py -k damaged``.
"""

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from PIL import Image

from flows.cli import main
from tests import corpus
from unfreeze.data import decoding
from unfreeze.data.decoding import MAX_ASPECT, BrokenImage, decode
from unfreeze.data.duplicates import find_duplicates
from unfreeze.data.folders import walk
from unfreeze.data.packed import open_packed
from unfreeze.data.packing import pack
from unfreeze.data.sources import read_source
from unfreeze.errors import TransientError, UserError
from unfreeze.settings.schema import Data

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")
MEGAPIXELS = 1.0
GOOD, BAD = corpus.good(), corpus.bad()
EXAMPLES = int(os.environ.get("FUZZ", "400"))


def read(data: bytes) -> np.ndarray:
    size, image = decode(io.BytesIO(data), MEGAPIXELS)
    assert size == image.size and image.mode == "RGB"
    return np.asarray(image).astype(float)


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.shape == expected.shape and bool(np.abs(found - expected).max() <= 1)


@pytest.mark.parametrize("name", GOOD)
def test_good_images_are_read_as_the_reference_reads_them(name: str) -> None:
    assert same(read(GOOD[name]), corpus.reference(GOOD[name]))


BY_TORCHVISION = [name for name in GOOD if name.endswith((".jpg", ".jpeg", "plain.png", ".gif", "lossy.webp"))]
"""Images that torchvision reads too. The loop below removes those that it decodes differently, or not at all."""
for otherwise in ("cmyk.jpg", "transparent.gif", "wrong ending.jpg"):
    BY_TORCHVISION.remove(otherwise)


@pytest.mark.parametrize("name", BY_TORCHVISION)
def test_they_are_read_as_torchvision_reads_them(name: str) -> None:
    peer = pytest.importorskip("torchvision.io")
    content = torch.frombuffer(bytearray(GOOD[name]), dtype=torch.uint8)
    theirs = peer.decode_image(content, peer.ImageReadMode.RGB, apply_exif_orientation=True)
    first = theirs[0] if theirs.ndim == 4 else theirs
    assert same(read(GOOD[name]), first.permute(1, 2, 0).numpy().astype(float))


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_set_aside_with_a_reason(tmp_path: Path, name: str) -> None:
    content, reason = BAD[name]
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(BrokenImage, match=reason) as caught:
        decode(tmp_path / "file", MEGAPIXELS)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_bombs_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", explode)
    for name in ("bomb.png", "bomb.gif", "bomb.bmp"):
        with pytest.raises(BrokenImage, match="megapixels"):
            decode(io.BytesIO(BAD[name][0]), 100)


def unusable(data: bytes) -> bool:
    """Whether the reference cannot read the image either, or its stated size exceeds the limits of the settings."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format in ("EPS", "WMF"):
                return True
            sizes = [image.size]
            image.load()
            sizes.append(image.size)
        corpus.reference(data)
    except Exception:
        return True
    return any(w * h > MEGAPIXELS * 1e6 or max(w, h) > MAX_ASPECT * min(w, h) for w, h in sizes)


@settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize="FUZZ" not in os.environ)
@given(corpus.damages())
def test_damaged_images_are_read_as_the_reference_reads_them_or_set_aside(damaged: tuple[str, bytes]) -> None:
    _, data = damaged
    try:
        found = read(data)
    except BrokenImage as error:
        assert str(error) and "\n" not in str(error)
        assert unusable(data), f"set aside without need: {error}"
    else:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            wide = image.mode.startswith("I") or image.mode == "F"
        assert wide or same(found, corpus.reference(data))


# Truncate each file while it is read. This runs in a separate process, because SIGBUS might kill it.
SHRUNK = """
import os, sys
from unfreeze.data import decoding
moment, *files = sys.argv[1:]
original = getattr(decoding, moment)
for file in files:
    content = open(file, "rb").read()
    def shrink(*arguments):
        os.truncate(file, 60)
        return original(*arguments)
    setattr(decoding, moment, shrink)
    try:
        decoding.decode(file, 100)
        print("read")
    except decoding.BrokenImage as error:
        print(error)
    open(file, "wb").write(content)
"""


@pytest.mark.parametrize("moment", ["_check_size", "_as_rgb"])
def test_a_file_that_gets_shorter_while_it_is_read_is_set_aside(tmp_path: Path, moment: str) -> None:
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 800), np.uint8))
    for suffix in ("bmp", "tif", "pgm", "tga", "png", "jpg", "gif", "webp"):
        grey.save(tmp_path / f"a.{suffix}")
    grey.save(tmp_path / "lzw.tif", compression="tiff_lzw")
    files = sorted(map(str, tmp_path.iterdir()))
    done = subprocess.run([sys.executable, "-c", SHRUNK, moment, *files], capture_output=True, text=True, timeout=100)
    assert done.returncode != -signal.SIGBUS, "a decoder had mapped the file"
    reasons = done.stdout.splitlines()
    assert len(reasons) == len(files), done.stderr
    assert all(reason.startswith(("damaged", "not an image", "changed while")) for reason in reasons), reasons


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for label in ("cat", "dog"):
        files = {
            f"{i}.png": corpus.encoded(np.roll(corpus.NOISE, i + 9 * (label == "dog"), 0), "PNG") for i in range(9)
        }
        corpus.write(tmp_path / "photos" / label, files)
    return tmp_path / "photos"


def packed(
    photos: Path, table: pd.DataFrame | None = None, share: float = 0.5
) -> tuple[dict[str, float], dict[str, str]]:
    """Metrics, and the reasons for skipped images."""
    data = Data(str(photos), 32, 0.2, 0.2, "group", share, MEGAPIXELS, "auto", None, 1)
    out = photos.parent / "out"
    metrics = pack(read_source(str(photos)) if table is None else table, out, data, 0)
    found = pd.read_csv(out / "images.csv", keep_default_na=False, dtype=str)
    assert len(found) == metrics["images"] + metrics["broken"]
    return metrics, dict(found.loc[found["reason"] != "", ["path", "reason"]].itertuples(index=False, name=None))


def test_files_that_vanish_or_change_are_set_aside(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = read_source(str(photos))
    (photos / "cat/0.png").unlink()
    (photos / "cat/1.png").unlink()
    (photos / "cat/1.png").mkdir()
    (photos / "cat/2.png").unlink()
    os.mkfifo(photos / "cat/2.png")
    original = decoding._as_rgb

    def meanwhile(*image: Any) -> Any:
        if not (photos / "dog/0.png").read_bytes().endswith(b"more"):
            with (photos / "dog/0.png").open("ab") as file:
                file.write(b"more")
        (photos / "dog/1.png").unlink(missing_ok=True)
        return original(*image)

    monkeypatch.setattr(decoding, "_as_rgb", meanwhile)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})  # images are read one after the other
    table = pd.concat([table[table["path"] == "dog/0.png"], table[table["path"] != "dog/0.png"]], ignore_index=True)
    metrics, reasons = packed(photos, table)
    assert metrics["images"] == 13 and reasons == {
        "cat/0.png": "cannot be read: No such file or directory",
        "cat/1.png": "not a file but a folder, pipe or device",
        "cat/2.png": "not a file but a folder, pipe or device",
        "dog/0.png": "changed while it was read",
        "dog/1.png": "cannot be read: No such file or directory",
    }


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOTCONN, errno.EHOSTDOWN])
def test_trouble_of_the_system_sets_no_image_aside(photos: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    usual = decoding._decode

    def failing(stream: Any, *arguments: Any) -> Any:
        if stream.name == str(photos / "dog/1.png"):
            raise OSError(number, os.strerror(number))
        return usual(stream, *arguments)

    monkeypatch.setattr(decoding, "_decode", failing)
    with pytest.raises(TransientError, match=rf"dog/1.png cannot be read now: {os.strerror(number)}.*start again"):
        packed(photos)
    assert not os.listdir(photos.parent / "out")


@pytest.mark.timeout(30)
def test_a_pipe_that_takes_a_files_place_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(GOOD["plain.png"])
    original = decoding._check_file

    def swapped(name: Path) -> os.stat_result:
        status = original(name)
        file.unlink()
        os.mkfifo(file)
        return status

    monkeypatch.setattr(decoding, "_check_file", swapped)
    with pytest.raises(BrokenImage):
        decode(file, MEGAPIXELS)


@pytest.mark.timeout(30)
def test_what_is_no_file_does_not_hang_the_packing(photos: Path) -> None:
    os.mkfifo(photos / "cat/pipe.jpg")
    (photos / "cat/zero.png").symlink_to("/dev/zero")
    (photos / "cat/circle.png").symlink_to("circle.png")
    (photos / "cat/nowhere.png").symlink_to("gone.png")
    (photos / "cat/round").symlink_to(photos)
    (photos / "cat/again").symlink_to(".")
    metrics, reasons = packed(photos)
    # The link to the whole folder is followed once. Its images occur under another name, as exact duplicates.
    assert {path: reason for path, reason in reasons.items() if "/round/" not in path} == {
        "cat/pipe.jpg": "not a file but a folder, pipe or device",
        "cat/zero.png": "not a file but a folder, pipe or device",
        "cat/circle.png": "cannot be read: Too many levels of symbolic links",
        "cat/nowhere.png": "cannot be read: No such file or directory",
    }
    assert metrics["images"] == 27


def test_files_without_the_right_to_read_them_are_set_aside(as_nobody: Path) -> None:
    file = as_nobody / "a.png"
    file.write_bytes(GOOD["plain.png"])
    file.chmod(0)
    with pytest.raises(BrokenImage, match="cannot be read: Permission denied"):
        decode(file, MEGAPIXELS)


def test_folders_without_the_right_to_read_them_are_named(as_nobody: Path) -> None:
    for label in ("cat", "dog"):
        corpus.write(as_nobody / label, {"a.png": GOOD["plain.png"]})
    (as_nobody / "dog").chmod(0)
    with pytest.raises(UserError, match=r"dog cannot be read: Permission denied"):
        read_source(str(as_nobody))
    (as_nobody / "dog").chmod(0o700)


def test_every_name_that_a_file_may_have_comes_back(photos: Path) -> None:
    names = [*corpus.NAMES, *map(os.fsdecode, corpus.RAW_NAMES)]
    corpus.write(
        photos / "cat" / "deep" / "er",
        {n: corpus.encoded(np.roll(corpus.NOISE, i, 1), "PNG") for i, n in enumerate(names)},
    )
    metrics, reasons = packed(photos)
    assert reasons == {} and metrics["images"] == 18 + len(names)
    found = pd.read_csv(photos.parent / "out/images.csv", keep_default_na=False, dtype=str)["path"]
    assert {f"cat/deep/er/{name}" for name in corpus.NAMES if "\t" not in name} <= set(found)
    assert {"cat/deep/er/tab\\t.png", "cat/deep/er/caf\\udce9.png", "cat/deep/er/\\udcff\\udcfe.png"} <= set(found)
    assert len(list(walk(str(photos / "cat")))) == 9 + len(names)


def test_an_image_under_two_labels_is_a_conflict_that_is_shown(photos: Path) -> None:
    (photos / "dog/copy.png").write_bytes((photos / "cat/3.png").read_bytes())
    (photos / "dog/link.png").symlink_to(photos / "cat/4.png")
    metrics, _ = packed(photos)
    images = open_packed(photos.parent / "out")
    pairs = find_duplicates(images).query("conflict")
    paths = [
        {images.table["path"][a], images.table["path"][b]} for a, b in zip(pairs["row_a"], pairs["row_b"], strict=True)
    ]
    assert {"cat/3.png", "dog/copy.png"} in paths and {"cat/4.png", "dog/link.png"} in paths
    assert metrics["images"] == 20


def test_names_that_are_no_utf_8_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Guess:
        def __init__(self, weights: Path) -> None: ...

        def predict(self, images: list[Path], views: int) -> pd.DataFrame:
            return pd.DataFrame({"predicted": "cat", "p_cat": 1.0, "reason": ["", "not an image"]})

    monkeypatch.setattr("unfreeze.evaluation.predictor.Predictor", Guess)
    corpus.write(tmp_path, {os.fsdecode(b"caf\xe9.png"): GOOD["plain.png"], "tab\t\x1b[31m.png": b"x"})
    assert main(["predict", str(tmp_path)]) == 1
    assert (
        capsys.readouterr().out
        == f"{tmp_path}/caf\\udce9.png: cat 100.0%\n{tmp_path}/tab\\t\\x1b[31m.png: not read: not an image\n"
    )
    assert main(["predict", str(tmp_path), "--csv"]) == 1
    assert "caf\\udce9.png,cat,1.0," in capsys.readouterr().out


def test_the_good_of_the_corpus_are_packed_and_the_bad_are_listed(photos: Path) -> None:
    corpus.write(photos / "cat/good", GOOD)
    corpus.write(photos / "dog/bad", {name: content for name, (content, _) in BAD.items()})
    metrics, reasons = packed(photos, share=0.9)
    assert metrics["images"] == 18 + len(GOOD) and metrics["broken"] == len(BAD)
    assert set(reasons) == {f"dog/bad/{name}" for name in BAD}


def test_the_source_is_never_written_to(photos: Path) -> None:
    corpus.write(photos / "dog/bad", {name: content for name, (content, _) in BAD.items()})
    everything = [photos, *photos.rglob("*")]
    before = {path: (path.stat().st_mtime_ns, path.stat().st_mode, path.stat().st_size) for path in everything}
    packed(photos, share=0.9)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_mode, path.stat().st_size) for path in everything} == before
    assert set(photos.rglob("*")) == set(everything[1:])


def test_errors_of_the_system_are_told_in_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(GOOD["plain.png"])
    for number in (errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG):

        def fail(*_: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(decoding, "_decode", fail)
        with pytest.raises(BrokenImage, match=f"cannot be read: {os.strerror(number)}"):
            decode(tmp_path / "a.png", MEGAPIXELS)


def test_decoders_get_no_descriptor_to_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file := tmp_path / "a.tif").write_bytes(GOOD["lzw.tiff"])
    with decoding._open(file, file.stat().st_size) as stream, pytest.raises(io.UnsupportedOperation):
        stream.fileno()
    monkeypatch.setattr(decoding, "MAX_HELD", 10)  # a large file is not read as a whole
    with decoding._open(file, file.stat().st_size) as stream:
        assert stream.fileno() > 0
    assert same(np.asarray(decode(file, MEGAPIXELS)[1]).astype(float), corpus.reference(GOOD["lzw.tiff"]))
