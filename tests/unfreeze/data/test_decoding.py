"""Decoding, compared with formulas, hand-written encoders and Pillow's own plain decoding."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from tests import corpus
from unfreeze.data.decoding import BrokenImage, UnknownGreyRange, decode, raw_greys, resize_shorter

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")  # pytest resets the module's own filters
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (23, 31, 3), np.uint8)
SMOOTH = np.stack([*np.meshgrid(np.linspace(0, 255, 31), np.linspace(0, 255, 23)), np.full((23, 31), 90.0)], 2).astype(
    np.uint8
)


def pixels(file: str | Path | io.BytesIO, size: int = 0) -> np.ndarray:
    return np.asarray(decode(file, 100, size)[1])


def encoded(image: Image.Image, kind: str, **how: object) -> io.BytesIO:
    return io.BytesIO(corpus.encoded(image, kind, **how))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> io.BytesIO:
    """Build a PNG file exactly by its specification: no filters, rows of bytes as given."""
    stride = len(rows) // height if height else 0
    scanlines = b"".join(b"\0" + rows[i * stride : (i + 1) * stride] for i in range(min(height, len(rows))))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(scanlines)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize("top", [65535, 4095, 200])
def test_sixteen_bit_grey_is_not_stretched_to_what_it_contains(top: int) -> None:
    values = np.linspace(0, top, 30 * 20).reshape(20, 30).astype(">u2")
    found = pixels(png(30, 20, 16, 0, values.tobytes()))
    np.testing.assert_array_equal(found, np.repeat(np.round(values / 257)[..., None], 3, 2))


def test_sixteen_bit_colour_and_tiff() -> None:
    values = RNG.integers(0, 65536, (20, 30, 3)).astype(">u2")
    assert np.abs(pixels(png(30, 20, 16, 2, values.tobytes())) - values / 257).max() <= 1
    grey = values[..., 0].astype(np.uint16)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(grey), "TIFF"))[..., 0], np.round(grey / 257))


def test_palette_with_alpha_is_composited_on_white() -> None:
    palette = bytes([255, 0, 0, 0, 255, 0, 0, 0, 255])
    found = pixels(
        png(30, 3, 8, 3, bytes(i % 3 for i in range(90)), (b"PLTE", palette), (b"tRNS", bytes([0, 255, 51])))
    )
    np.testing.assert_allclose(found[0, :3], [[255, 255, 255], [0, 255, 0], [204, 204, 255]], atol=1)


def test_alpha_is_composited_on_white() -> None:
    values = RNG.integers(0, 256, (20, 30, 4), np.uint8)
    share = values[..., 3:] / 255
    expected = share * values[..., :3] + (1 - share) * 255
    assert np.abs(pixels(png(30, 20, 8, 6, values.tobytes())) - expected).max() <= 1
    grey = values[..., [0, 3]]
    assert np.abs(pixels(png(30, 20, 8, 4, grey.tobytes())) - (share * grey[..., :1] + (1 - share) * 255)).max() <= 1


@pytest.mark.parametrize(("edge", "opacity"), [(0, 0), (1, 0), (0, 2)])
def test_transparency_that_hides_all_of_a_picture_does_not_count(edge: int, opacity: int) -> None:
    values = RNG.integers(0, 256, (40, 60, 4), np.uint8)
    values[..., 3] = 255
    values[edge : 40 - edge, edge : 60 - edge, 3] = opacity
    image = decode(encoded(Image.fromarray(values), "PNG"), 100)[1]
    np.testing.assert_array_equal(image, values[..., :3])
    assert image.info["remark"] == "completely transparent: shown as if opaque"


def test_what_a_file_says_of_itself_is_not_taken_for_our_remark() -> None:
    texts = PngImagePlugin.PngInfo()
    for name in ("remark", "greys"):
        texts.add_text(name, "of somebody else")
    assert decode(encoded(Image.fromarray(NOISE), "PNG", pnginfo=texts), 100)[1].info == {}


def test_transparency_counts_where_something_is_seen_or_nothing_is_beneath() -> None:
    cut_out = RNG.integers(0, 256, (40, 60, 4), np.uint8)
    cut_out[..., 3] = 0
    cut_out[18:20, 30:33, 3] = 255
    nothing = np.zeros((40, 60, 4), np.uint8)
    for values in (cut_out, nothing):
        image = decode(encoded(Image.fromarray(values), "PNG"), 100)[1]
        assert np.asarray(image)[5, 5].tolist() == [255, 255, 255] and "remark" not in image.info


def test_one_colour_of_a_png_may_be_transparent() -> None:
    values = np.tile(np.array([[10, 20, 30], [40, 50, 60]], np.uint8), (20, 15, 1))
    found = pixels(png(30, 20, 8, 2, values.tobytes(), (b"tRNS", struct.pack(">HHH", 10, 20, 30))))
    np.testing.assert_array_equal(found[0, :2], [[255, 255, 255], [40, 50, 60]])


def test_cmyk_one_bit_and_float() -> None:
    inks = RNG.integers(0, 256, (20, 30, 4), np.uint8)
    expected = 255 * (1 - inks[..., :3] / 255) * (1 - inks[..., 3:] / 255)
    assert np.abs(pixels(encoded(Image.fromarray(inks, "CMYK"), "TIFF")) - expected).max() <= 2
    flat = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    assert np.abs(pixels(encoded(flat, "JPEG"))[16, 16].astype(int) - [255, 0, 0]).max() <= 6
    bits = RNG.random((20, 32)) < 0.5
    np.testing.assert_array_equal(pixels(png(32, 20, 1, 0, np.packbits(bits).tobytes()))[..., 1], bits * 255)


def test_greys_of_more_than_8_bits_are_shown_by_the_range_that_is_given() -> None:
    real = RNG.random((20, 30), np.float32) * 3 - 1
    real[0, :3] = np.nan, np.inf, -np.inf
    file = encoded(Image.fromarray(real), "TIFF")
    image = decode(file, 100, grey_range=(-1, 2))[1]
    assert np.abs(np.asarray(image)[1:] - (real[1:, :, None] + 1) * 85).max() <= 0.51
    assert np.asarray(image)[0, :3, 0].tolist() == [0, 255, 0]
    np.testing.assert_allclose(np.asarray(image.info["greys"])[1:], (real[1:] + 1) * 85, atol=1e-4)
    inner = np.asarray(decode(file, 100, grey_range=(0, 1))[1])
    assert (inner[1:][real[1:] < 0] == 0).all() and (inner[1:][real[1:] > 1] == 255).all()
    with pytest.raises(UnknownGreyRange, match=r"no range of them is known \(data\.grey_range\)"):
        decode(file, 100, grey_range=None)


def test_only_greys_of_more_than_8_bits_are_decoded_to_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(-300, 300).reshape(20, 30).astype(np.int32)
    np.testing.assert_array_equal(raw_greys(encoded(Image.fromarray(values), "TIFF"), 100), values)
    jpeg = encoded(Image.fromarray(NOISE), "JPEG")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    assert raw_greys(jpeg, 100) is None


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", corpus.SEEN)
def test_exif_orientation_is_honoured(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[corpus.ORIENTATION] = orientation
    how = {"lossless": True} if kind == "WEBP" else {}
    stored = NOISE if kind != "JPEG" else np.asarray(Image.open(encoded(Image.fromarray(NOISE), "JPEG")))
    size, image = decode(encoded(Image.fromarray(NOISE), kind, exif=exif, **how), 100)
    np.testing.assert_array_equal(np.asarray(image), corpus.SEEN[orientation](stored))
    assert size == image.size == corpus.SEEN[orientation](NOISE).shape[1::-1]


DAMAGED_EXIF = {
    "cut off": b"II*\0\x08\0\0\0\x01\0",
    "leads nowhere": b"II*\0\xff\xff\xff\xff" + bytes(range(60)),
    "orientation is text": b"II*\0\x08\0\0\0\x01\0"
    + struct.pack("<HHI4s", corpus.ORIENTATION, 2, 4, b"up!\0")
    + bytes(4),
    "orientation is none of eight": b"II*\0\x08\0\0\0\x01\0"
    + struct.pack("<HHIHH", corpus.ORIENTATION, 3, 1, 9, 0)
    + bytes(4),
    "not EXIF at all": b"hello",
}


STEPS = b"step " * 300_000
LARGE_TEXTS = {
    "packed": [(b"zTXt", b"workflow\0\0" + zlib.compress(STEPS))],
    "international": [(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(STEPS))],
    "profile": [(b"iCCP", b"profile\0\0" + zlib.compress(bytes(2_000_000)))],
    "many": [(b"tEXt", b"a\0" + b"x" * 1_000_000)] * 65,
}


@pytest.mark.parametrize("chunks", LARGE_TEXTS.values(), ids=LARGE_TEXTS)
def test_large_texts_do_not_cost_a_png(tmp_path: Path, chunks: list[tuple[bytes, bytes]]) -> None:
    orientation = Image.Exif()
    orientation[corpus.ORIENTATION] = 3
    exif = (b"eXIf", orientation.tobytes().removeprefix(b"Exif\0\0"))
    heavy = png(31, 23, 8, 2, NOISE.tobytes(), *chunks, exif)
    (tmp_path / "a.png").write_bytes(heavy.getvalue())
    for file in (heavy, tmp_path / "a.png"):
        np.testing.assert_array_equal(pixels(file), NOISE[::-1, ::-1])
    with pytest.raises(BrokenImage, match="damaged"):
        decode(io.BytesIO(heavy.getvalue()[:-400]), 100)


@pytest.mark.parametrize("exif", DAMAGED_EXIF.values(), ids=DAMAGED_EXIF)
def test_damaged_exif_does_not_cost_the_image(exif: bytes) -> None:
    plain = encoded(Image.fromarray(NOISE), "JPEG")
    spoilt = encoded(Image.fromarray(NOISE), "JPEG", exif=b"Exif\0\0" + exif)
    np.testing.assert_array_equal(pixels(spoilt), pixels(plain))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "lime", "blue")]
    how = {"lossless": True} if kind == "WEBP" else {}
    found = pixels(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **how))
    assert (found == [255, 0, 0]).all()


def test_progressive_jpeg_is_read_like_a_plain_one() -> None:
    image = Image.fromarray(SMOOTH)
    np.testing.assert_array_equal(
        pixels(encoded(image, "JPEG", progressive=True)), pixels(encoded(image, "JPEG", progressive=False))
    )


def test_a_large_jpeg_is_decoded_small_but_looks_the_same() -> None:
    wave = np.add.outer(np.sin(np.arange(1200) / 40), np.cos(np.arange(1600) / 60))
    image = Image.fromarray(np.stack([(wave + 2) * 60, 255 - (wave + 2) * 50, wave * 0 + 99], 2).astype(np.uint8))
    file = encoded(image, "JPEG", quality=90)
    size, small = decode(file, 100, 100)
    assert size == (1600, 1200)
    assert 200 <= min(small.size) < 1200
    whole = decode(file, 100)[1]
    assert whole.size == (1600, 1200)
    difference = np.asarray(resize_shorter(small, 100), int) - np.asarray(resize_shorter(whole, 100), int)
    assert np.abs(difference).mean() < 1


ENCODERS: dict[str, tuple[str, dict[str, object]]] = {
    "png": ("PNG", {}),
    "jpeg": ("JPEG", {"quality": 95}),
    "progressive jpeg": ("JPEG", {"progressive": True}),
    "gif": ("GIF", {}),
    "webp": ("WEBP", {}),
    "lossless webp": ("WEBP", {"lossless": True}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {}),
    "lzw tiff": ("TIFF", {"compression": "tiff_lzw"}),
    "ppm": ("PPM", {}),
    "tga": ("TGA", {}),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_cut_off_anywhere_it_is_broken_or_nothing_was_lost(name: str) -> None:
    kind, how = ENCODERS[name]
    whole = encoded(Image.fromarray(NOISE), kind, **how).getvalue()
    expected = pixels(io.BytesIO(whole))
    broken = 0
    for length in {*range(0, len(whole), max(1, len(whole) // 150)), *range(len(whole) - 20, len(whole))}:
        try:
            np.testing.assert_array_equal(pixels(io.BytesIO(whole[:length])), expected)
        except BrokenImage as error:
            broken += 1
            assert len(str(error)) > 4
    assert broken >= 100


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(ENCODERS)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
)
def test_damaged_bytes_never_crash(name: str, changes: list[tuple[float, int]]) -> None:
    kind, how = ENCODERS[name]
    data = bytearray(encoded(Image.fromarray(NOISE), kind, **how).getvalue())
    for place, value in changes:
        data[int(place * len(data))] = value
    try:
        size, image = decode(io.BytesIO(bytes(data)), 1, 8)
    except BrokenImage as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert image.mode == "RGB" and min(size) > 0 and max(size) <= 20 * min(size)


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF", b"II*\0", b"BM", b"\0\0\1\0"]),
)
def test_arbitrary_bytes_never_crash(data: bytes, magic: bytes) -> None:
    with contextlib.suppress(BrokenImage):
        assert decode(io.BytesIO(magic + data), 1)[1].mode == "RGB"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404 not found</html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n%%EndComments\nshowpage\n", "program"),
    ],
)
def test_what_is_no_image_has_a_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(BrokenImage, match=reason):
        decode(tmp_path / "a.jpg", 100)


@pytest.mark.timeout(20)
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("circle.png", tmp_path / "circle.png")
    os.symlink("gone.png", tmp_path / "dangling.png")
    for name, reason in (
        ("pipe.png", "not a file"),
        ("", "not a file"),
        ("circle.png", "cannot be read: .*symbolic links"),
        ("dangling.png", "cannot be read: No such file"),
    ):
        with pytest.raises(BrokenImage, match=reason):
            decode(tmp_path / name, 100)


def test_an_unreadable_file_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "a.png")

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(BrokenImage, match="cannot be read: Permission denied"):
        decode(str(tmp_path / "a.png"), 100)


def test_bombs_are_refused_by_size_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", explode)
    for side in (15_000, 40_000, 2**31 - 1):
        with pytest.raises(BrokenImage, match="megapixels"):
            decode(png(side, side, 8, 0, b""), 100)
    with pytest.raises(BrokenImage, match="100 x 100 pixels are more than"):
        decode(encoded(Image.new("L", (100, 100)), "PNG"), 0.009)


@pytest.mark.parametrize(("side", "limit"), [(30_000, 100), (2000, 1)])
def test_a_bomb_inside_a_container_that_says_it_is_small_is_refused(side: int, limit: float) -> None:
    inner = png(side, side, 1, 0, b"").getvalue()
    icon = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22) + inner
    with pytest.raises(BrokenImage, match="megapixels"):
        decode(io.BytesIO(icon), limit)


def test_the_limit_is_the_settings_and_not_pillows() -> None:
    with pytest.raises(BrokenImage, match="damaged"):  # the file has no pixels, which only decoding detects
        decode(png(15_000, 15_000, 1, 0, b""), 300)


@pytest.mark.parametrize(
    ("size", "fine"), [((1, 1), True), ((200, 10), True), ((201, 10), False), ((1, 10_000), False)]
)
def test_slivers_are_refused(size: tuple[int, int], fine: bool) -> None:
    file = encoded(Image.new("RGB", size), "PNG")
    if fine:
        assert decode(file, 100)[0] == size
    else:
        with pytest.raises(BrokenImage, match="narrow"):
            decode(file, 100)


WARNED = """
import sys, threading, warnings
from unfreeze.data.decoding import BrokenImage, decode
def work():
    for _ in range(20):
        decode(sys.argv[1], 1)
workers = [threading.Thread(target=work) for _ in range(4)]
for worker in workers: worker.start()
for worker in workers: worker.join()
print(decode(sys.argv[1], 1)[1].mode)
warnings.warn("of someone else")
"""


def test_pillows_warnings_are_silent_in_threads_and_others_are_not(tmp_path: Path) -> None:
    cut = encoded(Image.fromarray(NOISE), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0").getvalue()
    (tmp_path / "a.jpg").write_bytes(cut)
    with pytest.warns(UserWarning):
        Image.open(io.BytesIO(cut)).getexif()
    command = [sys.executable, "-c", WARNED, str(tmp_path / "a.jpg")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "RGB\n"
    assert "of someone else" in done.stderr and "PIL" not in done.stderr


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(32, 96))
def test_the_shorter_side_is_exact_and_the_shape_stays(width: int, height: int, size: int) -> None:
    small = resize_shorter(Image.new("RGB", (width, height), (10, 200, 30)), size)
    assert min(small.size) == size
    assert abs(small.width * height - small.height * width) <= max(width, height)
    assert (np.asarray(small) == (10, 200, 30)).all()


def test_resizing_is_antialiased() -> None:
    board = np.indices((512, 512)).sum(0) % 2 * 255
    small = np.asarray(resize_shorter(Image.fromarray(board.astype(np.uint8)).convert("RGB"), 64))
    assert np.abs(small[4:-4, 4:-4].astype(int) - 127).max() <= 3
