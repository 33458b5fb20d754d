"""Decode image files: any format that Pillow reads.

The EXIF orientation is applied. Transparent images are blended with white; if all but the edges is transparent and the
colours hold a picture, transparency is ignored. Greys of more than 8 bits are scaled by a given range. Of an animation
the first frame is used. An image that cannot be read raises `BrokenImage` with a short reason.
"""

import contextlib
import errno
import importlib
import io
import logging
import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from unfreeze.data.recognition import recognised
from unfreeze.errors import TransientError

T = TypeVar("T")

FULL_RANGE = (0.0, 65535.0)
"""Black and white of 16-bit greys that use the full range."""
MAX_ASPECT = 20
"""Largest ratio of the longer to the shorter side; beyond it, no square crop represents the image."""
MAX_HELD = 2**28
"""Largest file in bytes that is read as a whole; decoders map parts of larger ones (long multi-page TIFFs)."""
FAINT = 16
"""Alpha value (0 to 255) below which a pixel counts as transparent.

Also the smallest difference of the highest and the lowest value of a colour channel that holds a picture."""
EDGE = 1 / 16
"""Width of the border that is ignored when looking for opaque pixels, as a share of width and height."""
HIDDEN = "completely transparent: shown as if opaque"
"""Remark on an image that is completely transparent."""
PROGRAMS = ("EPS", "WMF")
"""Formats that are programs, which a decoder would have to run."""
# Pillow's warnings are not needed: an image is read, or refused with a reason. Set once, because
# `warnings.catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # its messages are printed if logging is not configured
# Largest size in bytes of one text chunk in a PNG, and of all together. Pillow's limits are 1 MB and 64 MB, which an
# editor's history, a workflow or XMP may exceed.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28

with contextlib.suppress(ImportError):  # optional dependency for HEIC, the format of many phones
    importlib.import_module("pillow_heif").register_heif_opener()


# fmt: off
PASSING = (
    errno.EIO, errno.EREMOTEIO, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENODEV, errno.ESTALE,
    errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
    errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED,
)
# fmt: on
"""Error codes of the system (disk, network, resources). They are raised as `TransientError`: an image set aside
because of them would be missing permanently."""


class BrokenImage(Exception):
    """An image that cannot be used, with the reason."""


class UnknownGreyRange(BrokenImage):
    """A greyscale image of more than 8 bits with unknown values of black and white."""

    def __init__(self) -> None:
        super().__init__("greys of more than 8 bits, and no range of them is known (data.grey_range)")


def decode(
    file: str | Path | io.BytesIO,
    max_megapixels: float,
    size: int = 0,
    grey_range: tuple[float, float] | None = FULL_RANGE,
) -> tuple[tuple[int, int], Image.Image]:
    """Read an image as RGB, and its width and height in the file (after the EXIF orientation is applied).

    If the greys have more than 8 bits, ``info["greys"]`` is the image with unrounded values on the scale 0 to 255.
    ``info["remark"]``, if present, says how the image was read, for the log and the report.

    Args:
        file: path, or bytes in memory.
        max_megapixels: larger images are refused by the size in their header, before they are decoded.
        size: shorter side in pixels that is needed; a JPEG much larger is decoded at half, quarter or eighth size, but
            never below twice ``size``.
        grey_range: values of black and of white in greys of more than 8 bits; None if unknown.

    Raises:
        BrokenImage: the image cannot be read, is too large, or too narrow; `UnknownGreyRange` if the range is needed.
        TransientError: the disk, the network or the system fails.
    """
    return _opened(file, max_megapixels, lambda image: _read(image, max_megapixels, size, grey_range))


def raw_greys(file: str | Path | io.BytesIO, max_megapixels: float) -> NDArray[Any] | None:
    """The values (H, W) of an image whose greys have more than 8 bits; None for other images, which are not decoded.

    Errors as for `decode`.
    """

    def read(image: Image.Image) -> NDArray[Any] | None:
        _check_size(image.size, max_megapixels)
        return np.asarray(image) if _is_deep(image) else None

    return _opened(file, max_megapixels, read)


def check_header(file: str | Path, max_megapixels: float) -> None:
    """Check by a file's header that it is an image of an allowed size. Errors as for `decode`."""
    _opened(file, max_megapixels, lambda image: _check_size(image.size, max_megapixels))


def _opened(file: str | Path | io.BytesIO, max_megapixels: float, read: Callable[[Image.Image], T]) -> T:
    """Open an image, and return the result of ``read``. Errors as for `decode`."""
    # Pillow's own limit, which also applies to images in a container whose header gives another size.
    Image.MAX_IMAGE_PIXELS = int(max_megapixels * 1e6)
    try:
        if isinstance(file, io.BytesIO):
            return _decode(file, read)
        before = _check_file(file)
        with _open(file, before.st_size) as stream:
            found = _decode(stream, read)
        if _state(os.stat(file)) != _state(before):
            raise BrokenImage("changed while it was read")
        return found
    except BrokenImage:
        raise
    except Image.DecompressionBombError:
        raise BrokenImage(f"more than {max_megapixels:g} megapixels") from None
    except Exception as error:  # of any kind: unless it is one of `PASSING`, it is due to this image
        if isinstance(error, OSError) and error.errno in PASSING:
            raise TransientError(
                f"{file} cannot be read now: {error.strerror}. This is a system error, not a damaged image: "
                "start again, and remove the image if the error persists."
            ) from None
        if isinstance(error, OSError) and error.errno:
            raise BrokenImage(f"cannot be read: {error.strerror}") from None
        what = str(error).strip() or type(error).__name__
        raise BrokenImage(f"damaged: {what.splitlines()[0][:200]}") from None


def _check_file(file: str | Path) -> os.stat_result:
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):  # reading from a pipe would block
        raise BrokenImage("not a file but a folder, pipe or device")
    if status.st_size == 0:
        raise BrokenImage("empty file")
    return status


def _state(status: os.stat_result) -> tuple[int, int]:
    """Size and modification time, which differ if the file was written in the meantime."""
    return status.st_size, status.st_mtime_ns


class _Stream(io.FileIO):
    """A file without a file descriptor, so that decoders read it.

    With a descriptor, libtiff would map the file into memory. If another process shortens a mapped file, this process
    is killed by SIGBUS.
    """

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")


def _open(file: str | Path, size: int) -> BinaryIO:
    # O_NONBLOCK: if a pipe has replaced the file since, opening it does not wait for a writer.
    kind = _Stream if size <= MAX_HELD else io.FileIO
    return io.BufferedReader(kind(file, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)))


def _decode(stream: BinaryIO, read: Callable[[Image.Image], T]) -> T:
    try:
        opened = Image.open(stream)
    except UnidentifiedImageError:
        what = recognised(stream)
        raise BrokenImage(f"not an image that can be read: {what}" if what else "not an image") from None
    with opened as image:
        if image.format in PROGRAMS:
            raise BrokenImage(f"{image.format} is a program that draws, not an image")
        return read(image)


def _read(
    image: Image.Image, max_megapixels: float, size: int, grey_range: tuple[float, float] | None
) -> tuple[tuple[int, int], Image.Image]:
    seen = image.size
    _check_size(seen, max_megapixels)
    if size and image.format in ("JPEG", "MPO"):
        image.draft("RGB", (2 * size, 2 * size))
        image.load()
    else:
        image.load()
        seen = image.size  # of containers and TIFF it is known only now
        _check_size(seen, max_megapixels)
    stored = image.size
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # damaged EXIF, which does not affect the pixels
        pass
    rgb, said = _as_rgb(image, grey_range)
    rgb.info.clear()
    rgb.info.update(said)  # without the file's own metadata
    return (seen if image.size == stored else seen[::-1]), rgb


def _check_size(size: tuple[int, int], max_megapixels: float) -> None:
    width, height = size
    if width * height > max_megapixels * 1e6:
        raise BrokenImage(f"{width} x {height} pixels are more than {max_megapixels:g} megapixels")
    if max(size) > MAX_ASPECT * min(size):
        raise BrokenImage(f"{width} x {height} pixels are too narrow: more than {MAX_ASPECT} times as long as wide")


def _as_rgb(image: Image.Image, grey_range: tuple[float, float] | None) -> tuple[Image.Image, dict[str, Any]]:
    """An image as RGB, and its ``info`` as in `decode`."""
    if _is_deep(image):
        if grey_range is None:
            raise UnknownGreyRange
        greys = _scaled(np.asarray(image, np.float64), *grey_range)
        rgb = Image.fromarray((greys + 0.5).clip(0, 255).astype(np.uint8)).convert("RGB")
        return rgb, {"greys": Image.fromarray(greys.astype(np.float32))}
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if _hides_a_picture(image):
            return image.convert("RGB"), {"remark": HIDDEN}
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB"), {}


def _hides_a_picture(image: Image.Image) -> bool:
    """Whether an RGBA image is transparent everywhere except perhaps at its edges, but has a picture in its colours.

    Masks, sprites and exported tiles are saved like this; other readers ignore their alpha channel.
    """
    width, height = image.size
    x, y = int(width * EDGE), int(height * EDGE)
    extrema: Any = image.crop((x, y, width - x, height - y)).getextrema()  # of an RGBA image, a pair for each band
    *colours, (_, opacity) = extrema
    return opacity < FAINT and any(high - low >= FAINT for low, high in colours)


def _is_deep(image: Image.Image) -> bool:
    """Whether an image has greys of more than 8 bits: integers (``I``, ``I;16``, ``I;16B``) or floats (``F``)."""
    return image.mode.startswith("I") or image.mode == "F"


def _scaled(values: NDArray[np.float64], black: float, white: float) -> NDArray[np.float64]:
    """Scale greys of more than 8 bits so that black is 0 and white is 255; NaN becomes black."""
    values = np.nan_to_num(values, nan=black, posinf=white, neginf=black)
    return (values - black) * (255 / (white - black))


def resize_shorter(image: Image.Image, size: int) -> Image.Image:
    """The image with its shorter side at ``size`` pixels, antialiased."""
    width, height = image.size
    scale = size / min(width, height)
    target = (max(size, round(width * scale)), max(size, round(height * scale)))
    return image if target == image.size else image.resize(target, Image.Resampling.BICUBIC, reducing_gap=3.0)
