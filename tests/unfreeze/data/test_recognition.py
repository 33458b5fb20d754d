"""Files that are not readable images: the message names their type, and says what to do."""

import importlib.util
import io
import logging
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import corpus
from unfreeze.data.decoding import BrokenImage, decode

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")  # pytest resets the module's own filters
HEIC = struct.pack(">I", 28) + b"ftypheic" + bytes(4) + b"mif1heicmiaf" + struct.pack(">I", 8) + b"meta" + bytes(200)
HAS_HEIF = importlib.util.find_spec("pillow_heif") is not None


def tiff(bands: int, side: int = 16) -> bytes:
    """A TIFF with 16-bit bands, built exactly by its specification."""
    content = np.random.default_rng(0).integers(0, 10_000, (side, side, bands)).astype("<u2").tobytes()
    behind = 8 + len(content) + 2 + 12 * 10 + 4
    bits = struct.pack(f"<{bands}H", *[16] * bands)
    tags = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, bands, behind), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
            (277, 3, 1, bands), (278, 4, 1, side), (279, 4, 1, len(content)), (284, 3, 1, 1)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    start = 8 + len(content)
    return b"II*\0" + struct.pack("<I", start) + content + struct.pack("<H", len(tags)) + entries + bytes(4) + bits


STRANGE = {
    "pointer.jpg": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 48213\n",
        "a Git LFS pointer in its place; fetch the images with `git lfs pull`",
    ),
    "scan.jxl": (b"\xff\x0a" + bytes(range(200)), "JPEG XL; convert it to PNG or JPEG"),
    "boxed.jxl": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(200), "JPEG XL"),
    "logo.svg": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG, a drawing; export it as PNG"),
    "drone.tif": (tiff(5), "a TIFF of 5 bands of 16 bits; save one band"),
    "sentinel.tif": (tiff(13), "a TIFF of 13 bands of 16 bits; save one band"),
    "cut off.tif": (tiff(13)[:-100], "a TIFF that is damaged"),
    "scan.dcm": (bytes(128) + b"DICM" + bytes(100), "DICOM; convert it to 16-bit PNG or TIFF"),
    "clip.jpg": (struct.pack(">I", 16) + b"ftypisom" + bytes(300), "a video; extract its frames"),
    "page.gif": (b"\n<!DOCTYPE html><html>404</html>", "a web page, perhaps of a download that failed"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_it_is_called_by_its_name(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    content, what = STRANGE[name]
    (tmp_path / name).write_bytes(content)
    for file in (tmp_path / name, io.BytesIO(content)):
        with pytest.raises(BrokenImage) as caught:
            decode(file, 100)
        assert str(caught.value).startswith(f"not an image that can be read: {what}")
    assert not capfd.readouterr().err


def test_pillow_does_not_print_of_itself(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(BrokenImage):
        decode(io.BytesIO(tiff(13)), 100)
    assert not caplog.records


@pytest.mark.skipif(HAS_HEIF, reason="pillow-heif is installed")
def test_heic_says_what_to_install() -> None:
    with pytest.raises(BrokenImage, match="HEIC; install its reader with `pip install pillow-heif`"):
        decode(io.BytesIO(HEIC), 100)


@pytest.mark.skipif(not HAS_HEIF, reason="pillow-heif is not installed")
def test_heic_is_read_where_its_reader_is_installed() -> None:
    whole = corpus.encoded(Image.fromarray(corpus.PHOTO).resize((96, 64)), "HEIF", quality=95)
    size, image = decode(io.BytesIO(whole), 100)
    assert (
        size == (96, 64)
        and np.abs(np.asarray(image, float) - np.asarray(Image.fromarray(corpus.PHOTO).resize((96, 64)))).mean() < 10
    )
    for damaged in (HEIC, whole[:300], whole[: len(whole) // 2]):
        with pytest.raises(BrokenImage, match="damaged"):
            decode(io.BytesIO(damaged), 100)
