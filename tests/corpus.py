"""Test images as found in users' folders, made by real encoders: good, unusual and bad ones, and ways to damage them.

`reference` defines the correct pixels of a good image. It uses plain Pillow, and NumPy for transparency and for
greys of more than 8 bits.
"""

import functools
import io
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

RNG = np.random.default_rng(7)
NOISE = RNG.integers(0, 256, (23, 31, 3), np.uint8)
SMOOTH = np.stack([*np.meshgrid(np.linspace(0, 255, 31), np.linspace(0, 255, 23)), np.full((23, 31), 90.0)], 2)
PHOTO = (0.7 * SMOOTH + 0.3 * NOISE).astype(np.uint8)
ALPHA = np.dstack([PHOTO, np.linspace(0, 255, 23 * 31).reshape(23, 31).astype(np.uint8)])
ORIENTATION = 0x0112

# The eight orientations of the EXIF standard: each function turns the stored image into the displayed one.
SEEN: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


def encoded(image: Image.Image | np.ndarray, kind: str, **how: Any) -> bytes:
    """Encode an image with Pillow, as a file of the given format."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **how)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes = b"") -> bytes:
    """Build a PNG file exactly by its specification. Without rows, the file has a header but no pixels."""
    stride = max(1, len(rows) // height)
    lines = b"".join(b"\0" + rows[i : i + stride] for i in range(0, len(rows), stride))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + body


def _turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(PHOTO, "JPEG", exif=exif, quality=95)


def _animated(kind: str, **how: Any) -> bytes:
    frames = [Image.fromarray(np.roll(PHOTO, 5 * i, 1)) for i in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], **how)


@functools.cache
def good() -> dict[str, bytes]:
    """Files that are valid images, by name. Each must be read as `reference` reads it."""
    image, alpha = Image.fromarray(PHOTO), Image.fromarray(ALPHA)
    deep = RNG.integers(0, 65536, (23, 31)).astype(np.uint16)
    palette = image.quantize(16)
    files = {
        "baseline.jpg": encoded(image, "JPEG"),
        "progressive.jpg": encoded(image, "JPEG", progressive=True),
        "grey.jpg": encoded(image.convert("L"), "JPEG"),
        "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "not subsampled.jpeg": encoded(image, "JPEG", subsampling=0, quality=100),
        "restarts.jpg": encoded(image, "JPEG", restart_marker_blocks=1),
        "several.mpo": _animated("MPO"),
        "plain.png": encoded(image, "PNG"),
        "interlaced bits.png": png(31, 23, 1, 0, bytes(RNG.integers(0, 256, 4 * 23, np.uint8))),
        "grey and alpha.png": encoded(alpha.convert("LA"), "PNG"),
        "alpha.png": encoded(alpha, "PNG"),
        "palette.png": encoded(palette, "PNG"),
        "palette with alpha.png": encoded(palette, "PNG", transparency=bytes(range(0, 256, 16))),
        "one colour of a palette.png": encoded(palette, "PNG", transparency=3),
        "one colour.png": encoded(image, "PNG", transparency=tuple(int(v) for v in PHOTO[3, 3])),
        "16 bit.png": encoded(deep, "PNG"),
        "16 bit colour.png": png(31, 23, 16, 2, RNG.integers(0, 256, 31 * 23 * 6, np.uint8).tobytes()),
        "animated.png": _animated("PNG"),
        "plain.gif": encoded(image, "GIF"),
        "animated.gif": _animated("GIF"),
        "transparent.gif": encoded(palette, "GIF", transparency=2),
        "lossy.webp": encoded(image, "WEBP"),
        "lossless alpha.webp": encoded(alpha, "WEBP", lossless=True),
        "animated.webp": _animated("WEBP", lossless=True),
        "raw.tif": encoded(image, "TIFF"),
        "lzw.tiff": encoded(image, "TIFF", compression="tiff_lzw"),
        "deflate.tiff": encoded(image, "TIFF", compression="tiff_adobe_deflate"),
        "jpeg inside.tiff": encoded(image, "TIFF", compression="jpeg"),
        "fax.tiff": encoded(image.convert("1"), "TIFF", compression="group4"),
        "16 bit.tiff": encoded(deep, "TIFF"),
        "real.tiff": encoded(RNG.random((23, 31), np.float32) * 65535, "TIFF"),
        "cmyk.tiff": encoded(image.convert("CMYK"), "TIFF"),
        "turned.tiff": encoded(image, "TIFF", compression="tiff_lzw", tiffinfo={ORIENTATION: 6}),
        "pages.tiff": _animated("TIFF"),
        "plain.bmp": encoded(image, "BMP"),
        "bits.bmp": encoded(image.convert("1"), "BMP"),
        "plain.ppm": encoded(image, "PPM"),
        "plain.tga": encoded(image, "TGA", compression="tga_rle"),
        "plain.jp2": encoded(image, "JPEG2000"),
        "icon.ico": encoded(image.resize((32, 32)), "ICO", sizes=[(16, 16), (32, 32)]),
        "plain.pcx": encoded(image, "PCX"),
        "wrong ending.png": encoded(image, "JPEG"),
        "wrong ending.jpg": encoded(image, "PNG"),
        "no ending": encoded(image, "WEBP"),
        "unknown.ending": encoded(image, "GIF"),
        "one pixel.png": encoded(np.full((1, 1, 3), 200, np.uint8), "PNG"),
        "20 to 1.png": encoded(np.tile(PHOTO[:10], (1, 7, 1))[:, :200], "PNG"),
        "behind the end.jpg": encoded(image, "JPEG") + b"and something else" * 20,
    }
    return files | {f"orientation {i}.jpg": _turned(i) for i in SEEN}


def bad() -> dict[str, tuple[bytes, str]]:
    """Files that cannot be used, by name, with the expected reason."""
    image = Image.fromarray(PHOTO)
    jpeg, whole = encoded(image, "JPEG"), encoded(image, "PNG")
    inner = png(30_000, 30_000, 1, 0)
    icon = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22) + inner
    return {
        "empty.jpg": (b"", "empty file"),
        "zeros.jpg": (bytes(5000), "not an image"),
        "page.gif": (b"<html>404 not found</html>", "not an image"),
        "text.jpg": ("eine Katze 🐈\n".encode() * 50, "not an image"),
        "magic only.png": (whole[:8], "not an image|damaged"),
        "half a header.png": (whole[:20], "not an image|damaged"),
        "cut off.jpg": (jpeg[: len(jpeg) // 2], "damaged: .*[Tt]runcated"),
        "cut off.png": (whole[: len(whole) // 2], "damaged"),
        "cut off.webp": (encoded(image, "WEBP")[:200], "damaged|not an image"),
        "cut off.gif": (encoded(image, "GIF")[:-200], "damaged"),
        "cut off.tiff": (encoded(image, "TIFF", compression="tiff_lzw")[:-900], "damaged|not an image"),
        "header rotten.png": (whole[:16] + b"\xff\xff" + whole[18:], "damaged|not an image|more than"),
        "bomb.png": (png(60_000, 60_000, 8, 2), "more than .* megapixels"),
        "bomb.gif": (b"GIF89a" + struct.pack("<HH", 65535, 65535) + encoded(image, "GIF")[10:], "megapixels"),
        "bomb.bmp": (
            encoded(image, "BMP")[:18] + struct.pack("<ii", 90_000, 90_000) + encoded(image, "BMP")[26:],
            "megapixels",
        ),
        "bomb in an icon.ico": (icon, "megapixels"),
        "1 x 10000.png": (encoded(Image.new("L", (1, 10_000)), "PNG"), "1 x 10000 pixels are too narrow"),
        "10000 x 1.jpg": (encoded(Image.new("L", (10_000, 1)), "JPEG"), "10000 x 1 pixels are too narrow"),
        "program.jpg": (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n%%EndComments\n(x) run showpage\n",
            "program",
        ),
        "pickle.jpg": (b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93.", "not an image"),
    }


NAMES = ["two words.png", "line\nfeed.png", "tab\t.png", "ü 🐈‍⬛.png", "a,b;c\"d'.png", "%20 #&.png", "-rf.png", "=1+1.png",
         '"><img src=x onerror=alert(1)>.png', "<script>alert(1)<|script>.png", "x" * 251 + ".png", "dots...png"]  # fmt: skip
"""Valid file names that tools often fail on."""
RAW_NAMES = [b"caf\xe9.png", b"\xff\xfe.png"]
"""File names that are not valid UTF-8."""


def reference(data: bytes) -> np.ndarray:
    """Displayed pixels of an image, (H, W, 3), decoded with Pillow. Raises Pillow's own exceptions."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        try:
            orientation = image.getexif().get(ORIENTATION, 1)
        except Exception:
            orientation = 1
        if image.mode.startswith("I") or image.mode == "F":
            values = np.nan_to_num(np.asarray(image).astype(float), nan=0, posinf=np.inf, neginf=0)
            shown = np.round(values.clip(0, 65535) / 257)[..., None].repeat(3, 2)
        elif image.has_transparency_data:
            rgba = np.asarray(image.convert("RGBA")).astype(float)
            share = rgba[..., 3:] / 255
            shown = share * rgba[..., :3] + (1 - share) * 255
        else:
            shown = np.asarray(image.convert("RGB")).astype(float)
    return SEEN.get(orientation, SEEN[1])(shown)


def places(data: bytes) -> list[int]:
    """Offsets of a file's structure: its header, the markers of a JPEG, the chunks of a PNG or WebP, the directory of a
    TIFF, the blocks of a GIF, and the end."""
    found = {*range(min(64, len(data))), len(data) - 1, len(data) - 2, len(data) - 12}
    if data[:2] == b"\xff\xd8":
        found |= {match.start() + i for match in re.finditer(rb"\xff[\xc0-\xfe]", data) for i in range(10)}
    elif data[:4] in (b"\x89PNG", b"RIFF"):
        chunk = rb"IHDR|PLTE|tRNS|IDAT|IEND|acTL|fcTL|fdAT|VP8.|ANIM|ANMF|ALPH"
        found |= {match.start() + i for match in re.finditer(chunk, data) for i in range(-4, 14)}
    elif data[:4] == b"II*\0" and len(data) >= 8:
        start = struct.unpack("<I", data[4:8])[0]
        found |= set(range(start, start + 200))
    elif data[:3] == b"GIF":
        found |= {match.start() + i for match in re.finditer(rb"[\x21\x2c]", data) for i in range(10)}
    return sorted(place for place in found if 0 <= place < len(data))


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, bytes]:
    """Damage a good file: truncate it, flip bits, write extreme values, or zero, remove, repeat or insert bytes."""
    name = draw(st.sampled_from(sorted(good())))
    data = good()[name]
    for _ in range(draw(st.integers(1, 3))):
        if not data:
            break
        where = st.sampled_from(places(data)) if draw(st.booleans()) else st.integers(0, len(data) - 1)
        place, length = draw(where), draw(st.sampled_from([1, 2, 4, 16, 300]))
        rest = data[place + length :]
        kind = draw(st.sampled_from(["cut", "flip", "number", "zero", "lose", "repeat", "insert"]))
        if kind == "cut":
            data = data[:place]
        elif kind == "flip":
            data = data[:place] + bytes([data[place] ^ 1 << draw(st.integers(0, 7))]) + data[place + 1 :]
        elif kind == "number":
            number = draw(st.sampled_from([b"\0", b"\x01", b"\x7f", b"\x80", b"\xff"])) * min(length, 4)
            data = data[:place] + number + data[place + len(number) :]
        elif kind == "zero":
            data = data[:place] + bytes(length) + rest
        elif kind == "lose":
            data = data[:place] + rest
        elif kind == "repeat":
            data = data[: place + length] + data[place:]
        else:
            data = data[:place] + draw(st.binary(max_size=40)) + data[place:]
    return name, data


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Write files into a folder. Names may contain undecodable bytes (`os.fsdecode`)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
