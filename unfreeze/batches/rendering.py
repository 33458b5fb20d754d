"""Render batches from packed pixels: one warp and one multiply-add for each view.

On a GPU everything (mirroring, turning, zooming, cropping, lighting, normalising) is computed for the whole batch at
once. Only the rectangle of each image that its views cover is needed. It is on the GPU already if all packed pixels fit
there; otherwise the CPU copies it, one byte per value, once for all views of the image. On a CPU, OpenCV warps image by
image, which takes half the time of warping all images as one batch. The views are the same, but OpenCV rounds to whole
values from 0 to 255.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from unfreeze.batches.views import Views
from unfreeze.data.packed import PackedImages

LINEAR = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
PIECE = 400_000
"""Values per block for lighting on a CPU, so that a block of floats fits into a core's cache."""
ROUNDING = 1e-3
"""Pixels by which rounding errors may place a view beyond the edge of its image. With a larger tolerance, views that do
extend beyond the edge would not be mirrored there."""


@dataclass(frozen=True)
class Normalisation:
    """Per-channel mean and standard deviation that the backbone was trained with, for pixel values from 0 to 1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def render_here(packed: PackedImages, views: Views, norm: Normalisation, dtype: torch.dtype) -> torch.Tensor:
    """Render a batch on the CPU: (B, 3, S, S) of type ``dtype``, channels last."""
    count, size = len(views), packed.image_size
    low, high = _rectangles(packed, views)
    # Affine map of each view from output pixels to its rectangle: linear part, position of the first pixel.
    corner = views.centre - views.linear.sum(2) * ((size - 1) / 2) - low
    maps = np.concatenate([views.linear, corner[:, :, None]], 2)
    pixels = np.empty((count, size, size, 3), np.uint8)
    for target, row, first, behind, map_ in zip(pixels, views.rows, low, high, maps, strict=True):
        if views.plain:
            packed.crop(row, first, behind, target)
        else:
            image = packed.crop(row, first, behind)
            cv2.warpAffine(image, map_, (size, size), target, LINEAR, cv2.BORDER_REFLECT_101)
    # Lighting is not applied right after each image's warp: OpenCV's and torch's threads would wait for one another.
    # Operations on whole rows with interleaved channels take half the time of operations on pixels of three values.
    scale, offset = (torch.from_numpy(np.tile(v, size))[:, None] for v in _lighting(views, norm))
    images = torch.empty((count, size, size * 3), dtype=dtype)
    few = max(1, PIECE // (size * size * 3))
    lit = torch.empty((few, size, size * 3))
    for first in range(0, count, few):
        part = slice(first, first + few)
        piece = lit[: len(images[part])].copy_(torch.from_numpy(pixels[part]).flatten(2))
        images[part] = torch.addcmul(offset[part], piece, scale[part], out=piece)
    return images.unflatten(2, (size, 3)).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class BatchPixels:
    """The pixels that a batch of views needs, and their locations.

    Attributes:
        values: (P, 3) uint8, of several images.
        first: (B,) index in `values` of the first stored pixel of each view's image.
        width: (B,) number of pixels of this image per row in `values`.
        origin: (B, 2) column and row in the image of the pixel at `first`.
    """

    values: torch.Tensor
    first: NDArray[np.int64]
    width: NDArray[np.int64]
    origin: NDArray[np.int64]


@dataclass(frozen=True)
class Canvas:
    """The pixels that each view of a batch needs, on the device.

    Attributes:
        pixels: (B, H, W, 3) uint8; each view's rectangle in the upper left corner. Values beyond it are not used.
        origin: (B, 2) position (x, y) in the image of the rectangle's upper left corner.
    """

    pixels: torch.Tensor
    origin: NDArray[np.float32]


def read_pixels(packed: PackedImages, views: Views) -> BatchPixels:
    """Read the rectangle of every image that its views cover, once for all views; page-locked if there is a GPU."""
    rows, image = np.unique(views.rows, return_inverse=True)
    lows, highs = _rectangles(packed, views)
    low, high = packed.sizes[rows], np.zeros((len(rows), 2), np.int64)
    np.minimum.at(low, image, lows)
    np.maximum.at(high, image, highs)
    width, height = (high - low).T
    ends = (width * height).cumsum()
    values = torch.empty((int(ends[-1]), 3), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    parts = np.split(values.numpy(), ends[:-1])
    for part, row, first, behind, columns in zip(parts, rows, low, high, width, strict=True):
        packed.crop(row, first, behind, part.reshape(-1, columns, 3))
    return BatchPixels(values, (ends - width * height)[image], width[image], low[image])


def find_pixels(values: torch.Tensor, packed: PackedImages, views: Views) -> BatchPixels:
    """As `read_pixels`, but from ``values`` (P, 3): the packed pixels of all images, one after another."""
    first, width = packed.offsets[views.rows] // 3, packed.sizes[views.rows, 0]
    return BatchPixels(values, first, width, np.zeros((len(views), 2), np.int64))


def gather_canvas(pixels: BatchPixels, packed: PackedImages, views: Views, device: torch.device) -> Canvas:
    """Gather each view's rectangle on the device; beyond the rectangle its edge is repeated."""
    low, high = _rectangles(packed, views)
    column, row = (low - pixels.origin).T
    first = pixels.first + row * pixels.width + column
    numbers = np.concatenate([first[:, None], pixels.width[:, None], high - low - 1], 1)
    first_, wide_, last_x, last_y = upload(torch.from_numpy(numbers), device)[:, :, None].unbind(1)
    width, height = (high - low).max(0)
    x = torch.arange(width, device=device).minimum(last_x)
    y = torch.arange(height, device=device).minimum(last_y)
    places = (first_ + y * wide_)[:, :, None] + x[:, None]
    return Canvas(upload(pixels.values, device)[places], low.astype(np.float32))


def _rectangles(packed: PackedImages, views: Views) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rectangle of the image that each view covers: first column and row, and ends (exclusive), (B, 2) each."""
    reach = np.abs(views.linear).sum(2) * (packed.image_size - 1) / 2
    low = np.maximum(np.floor(views.centre - reach), 0).astype(np.int64)
    return low, np.minimum(np.ceil(views.centre + reach) + 1, packed.sizes[views.rows]).astype(np.int64)


def render(
    canvas: Canvas, views: Views, sizes: NDArray[np.int64], image_size: int, norm: Normalisation, device: torch.device
) -> torch.Tensor:
    """Warp, light and normalise a batch on the device.

    Args:
        canvas: as `gather_canvas` returns it.
        views: the views to render.
        sizes: (B, 2) width and height of the images in pixels; positions outside are mirrored at the edges.
        image_size: side of the output square in pixels.
        norm: the backbone's normalisation.
        device: where to compute.

    Returns:
        (B, 3, S, S) float32, channels last.
    """
    width = canvas.pixels.shape[2]
    lit = upload(torch.from_numpy(np.stack(_lighting(views, norm))), device)
    scale, offset = lit.repeat(1, 1, width)[:, :, None]
    # Lighting before the warp gives the same result, because a warp averages pixels linearly.
    rows = torch.addcmul(offset, upload(canvas.pixels, device).flatten(2).float(), scale)
    images = rows.unflatten(2, (width, 3)).permute(0, 3, 1, 2)
    if not views.plain:
        images = F.grid_sample(
            images, _grid(canvas, views, sizes, image_size, device), padding_mode="border", align_corners=False
        )
    return images.contiguous(memory_format=torch.channels_last)


def _lighting(views: Views, norm: Normalisation) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Factor and offset, (B, 3) each, that apply brightness and contrast to byte values and normalise them.

    ((p/255 - 1/2) * gain + 1/2 + shift - mean) / std as one multiply-add.
    """
    mean, std = (np.array(v, np.float32) for v in (norm.mean, norm.std))
    gain, shift = views.gain[:, None], views.shift[:, None]
    return gain / (255 * std), (0.5 - 0.5 * gain + shift - mean) / std


def _grid(
    canvas: Canvas, views: Views, sizes: NDArray[np.int64], image_size: int, device: torch.device
) -> torch.Tensor:
    """Position in its canvas of each output pixel, (B, S, S, 2), as `grid_sample` takes it: -1 to 1 from edge to edge.

    The only large operation is one addition; positions outside the image are mirrored only if there are any.
    """
    last = (sizes - 1).astype(np.float32)
    reach = np.abs(views.linear).sum(2) * (image_size - 1) / 2
    inside = bool(((views.centre >= reach - ROUNDING) & (views.centre + reach <= last + ROUNDING)).all())
    extent = np.array(canvas.pixels.shape[2:0:-1], np.float32)
    to_grid = np.float32(2) / extent
    shift = (to_grid * (np.float32(0.5) - canvas.origin) - np.float32(1)).astype(np.float32)
    linear, centre = views.linear, views.centre
    if inside:
        linear, centre = linear * to_grid[:, None], centre * to_grid + shift
    numbers = np.concatenate([linear.transpose(0, 2, 1), centre[:, None], last[:, None], shift[:, None]], 1)
    column_x, column_y, centre_, edge, term = (v[:, None] for v in upload(torch.from_numpy(numbers), device).unbind(1))
    offset = (torch.arange(image_size, device=device) - (image_size - 1) / 2)[:, None]
    x, y = column_x * offset, column_y * offset + centre_  # (B, S, 2) each
    # As complex numbers: the same sums, but in long inner loops instead of loops over pairs.
    x, y = torch.view_as_complex(x), torch.view_as_complex(y)
    place = torch.view_as_real(x[:, None] + y[:, :, None])
    if inside:
        return place
    edge, term, factor = edge[:, None], term[:, None], upload(torch.from_numpy(to_grid), device)
    # Mirrored at both edges, then from pixels to the grid's units.
    return place.abs_().sub_(edge).abs_().neg_().add_(edge).mul_(factor).add_(term)


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device; a copy to a GPU is asynchronous."""
    if device.type == "cpu" or tensor.is_cuda:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
