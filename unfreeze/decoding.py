"""From a file to pixels: any image that Pillow reads, as people see it.

The EXIF orientation is honoured, transparency is shown on white, 16-bit grey keeps its range, of an animation the first
frame counts. What cannot be read raises `BrokenImage` with a reason that says so in a few words.
"""

import io
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_ASPECT = 20
"""Longer side over shorter side; beyond it, no square says anything about the image."""

Pixels = NDArray[np.uint8]


class BrokenImage(Exception):
    """An image that cannot be used, with the reason."""


def decode(file: str | Path | io.BytesIO, max_megapixels: float, size: int = 0) -> tuple[tuple[int, int], Image.Image]:
    """Read an image as RGB, with the width and height that its header says.

    Args:
        file: path, or bytes in memory.
        max_megapixels: larger images are refused by what their header says, before they are decoded.
        size: shorter side in pixels that is needed; a JPEG much larger is decoded at half, quarter or eighth size.

    Raises:
        BrokenImage: the image cannot be read, is too large, or too narrow.
    """
    try:
        if not isinstance(file, io.BytesIO) and Path(file).stat().st_size == 0:
            raise BrokenImage("empty file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                shown = image.size
                _check_size(shown, max_megapixels)
                if size and image.format == "JPEG":
                    image.draft("RGB", (2 * size, 2 * size))
                return shown, _as_rgb(ImageOps.exif_transpose(image))
    except BrokenImage:
        raise
    except UnidentifiedImageError:
        raise BrokenImage("not an image") from None
    except Image.DecompressionBombError:
        raise BrokenImage("larger than data.max_megapixels") from None
    except Exception as error:  # whatever a decoder trips over, it is this one image that is at fault
        raise BrokenImage(f"damaged: {error}".splitlines()[0][:200]) from None


def _check_size(size: tuple[int, int], max_megapixels: float) -> None:
    width, height = size
    if width * height > max_megapixels * 1e6:
        raise BrokenImage(f"{width} x {height} pixels are more than data.max_megapixels")
    if max(size) > MAX_ASPECT * min(size):
        raise BrokenImage(f"{width} x {height} pixels are too narrow: more than {MAX_ASPECT} times as long as wide")


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        # 16-bit grey comes as 0..65535; other ranges are stretched to what there is.
        top = (
            65535.0
            if values.max(initial=0) > 255 and values.max(initial=0) <= 65535
            else max(values.max(initial=0), 1.0)
        )
        low = min(values.min(initial=0), 0.0)
        top = 255.0 if 1 < top <= 255 and low == 0 else top
        return Image.fromarray(((values - low) * (255 / (top - low)) + 0.5).clip(0, 255).astype(np.uint8)).convert(
            "RGB"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    image.load()
    return image.convert("RGB")


def resize_shorter(image: Image.Image, size: int) -> Image.Image:
    """The image with its shorter side at ``size`` pixels, antialiased."""
    width, height = image.size
    scale = size / min(width, height)
    target = (max(size, round(width * scale)), max(size, round(height * scale)))
    return image if target == image.size else image.resize(target, Image.Resampling.BICUBIC, reducing_gap=3.0)
