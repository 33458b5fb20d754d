"""From packed pixels to normalised batches on the device: read bytes, warp once.

The processor only copies bytes: of each image the rectangle that its view needs. Everything else (mirroring, turning,
zooming, cropping, lighting, normalising) happens for the whole batch at once on the device, in one warp and one
multiply-add, after an upload of one byte per value.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from unfreeze.packed import PackedImages
from unfreeze.progress import track
from unfreeze.settings import Augment
from unfreeze.views import Views, plain_views, random_views

T = TypeVar("T")
Batch = tuple[torch.Tensor, torch.Tensor]
"""Inputs (B, ...) and class numbers (B,), on the device."""


@dataclass(frozen=True)
class Canvas:
    """The bytes that a batch of views needs.

    Attributes:
        pixels: (B, H, W, 3) uint8; each image's rectangle in the upper left corner.
        origin: (B, 2) where in the image (x, y) the rectangle begins.
    """

    pixels: torch.Tensor
    origin: NDArray[np.float32]


def read_canvas(packed: PackedImages, views: Views) -> Canvas:
    """Copy the rectangle of every image that its view touches."""
    size = packed.image_size
    sizes = image_sizes(packed, views.rows)
    reach = np.abs(views.linear).sum(2) * (size - 1) / 2
    low = np.maximum(np.floor(views.centre - reach), 0).astype(np.int64)
    high = np.minimum(np.ceil(views.centre + reach) + 1, sizes).astype(np.int64)
    width, height = (high - low).max(0)
    pixels = np.zeros((len(views), height, width, 3), np.uint8)
    for target, row, (x0, y0), (x1, y1) in zip(pixels, views.rows, low, high, strict=True):
        target[: y1 - y0, : x1 - x0] = packed[row][y0:y1, x0:x1]
    packed.release()
    return Canvas(torch.from_numpy(pixels), low.astype(np.float32))


def image_sizes(packed: PackedImages, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Width and height in pixels of packed images, (B, 2)."""
    return packed.sizes[rows]


@dataclass(frozen=True)
class Normalisation:
    """Per-channel mean and standard deviation of pixel values as shares of full white, as the backbone was trained."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def render(
    canvas: Canvas, views: Views, sizes: NDArray[np.int64], image_size: int, norm: Normalisation, device: torch.device
) -> torch.Tensor:
    """Warp, light and normalise a batch on the device.

    Args:
        canvas: what `read_canvas` copied.
        views: the views to render.
        sizes: (B, 2) width and height of the images in pixels, at whose edges places outside are mirrored.
        image_size: side of the output square in pixels.
        norm: the backbone's normalisation.
        device: where to compute.

    Returns:
        (B, 3, S, S) float32, channels last.
    """
    mean, std = (torch.tensor(v, device=device) for v in (norm.mean, norm.std))
    gain, shift = (_upload(torch.from_numpy(v), device)[:, None] for v in (views.gain, views.shift))
    # ((p/255 - 1/2) * gain + 1/2 + shift - mean) / std as one multiply-add, before the warp (which averages), as there the
    # channels of a row lie side by side: whole rows take half the time of pixels of three values.
    scale, offset = gain / (255 * std), (0.5 - 0.5 * gain + shift - mean) / std
    width = canvas.pixels.shape[2]
    rows = _upload(canvas.pixels, device).flatten(2).float()
    rows.mul_(scale.repeat(1, width)[:, None]).add_(offset.repeat(1, width)[:, None])
    images = rows.unflatten(2, (width, 3)).permute(0, 3, 1, 2)
    if not views.plain:
        images = F.grid_sample(
            images, _grid(canvas, views, sizes, image_size, device), padding_mode="border", align_corners=False
        )
    return images.contiguous(memory_format=torch.channels_last)


def _grid(
    canvas: Canvas, views: Views, sizes: NDArray[np.int64], image_size: int, device: torch.device
) -> torch.Tensor:
    """Where in its canvas each output pixel looks, (B, S, S, 2) as `grid_sample` wants it: -1 to 1 from edge to edge.

    The large arithmetic is one addition; places outside the image are mirrored only where there are any.
    """
    last = (sizes - 1).astype(np.float32)
    reach = np.abs(views.linear).sum(2) * (image_size - 1) / 2
    inside = bool(((views.centre >= reach - 0.5) & (views.centre + reach <= last + 0.5)).all())
    extent = np.array(canvas.pixels.shape[2:0:-1], np.float32)
    to_grid = np.float32(2) / extent
    shift = (to_grid * (np.float32(0.5) - canvas.origin) - np.float32(1)).astype(np.float32)
    linear, centre = views.linear, views.centre
    if inside:
        linear, centre = linear * to_grid[:, None], centre * to_grid + shift
    offset = np.arange(image_size, dtype=np.float32) - (image_size - 1) / 2
    along_x = linear[:, None, :, 0] * offset[:, None]
    along_y = linear[:, None, :, 1] * offset[:, None] + centre[:, None]
    x, y = (_upload(torch.from_numpy(a), device) for a in (along_x, along_y))
    # As complex numbers: the same sums, but long loops of them instead of pairs.
    x, y = torch.view_as_complex(x), torch.view_as_complex(y)
    place = torch.view_as_real(x[:, None] + y[:, :, None])
    if inside:
        return place
    edge, factor, term = (
        _upload(torch.from_numpy(np.broadcast_to(a, last.shape).copy()), device)[:, None, None]
        for a in (last, to_grid, shift)
    )
    # Mirrored at both edges, then from pixels to the grid's units.
    return place.abs_().sub_(edge).abs_().neg_().add_(edge).mul_(factor).add_(term)


def _upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def prefetch(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """Work through ``items`` in a thread, ``depth`` ahead, so that reading overlaps computing.

    What goes wrong in the thread is raised here, and a consumer that stops early stops the thread.
    """
    done = object()
    line: queue.Queue[object] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: object) -> bool:
        while not stop.is_set():
            try:
                line.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(done)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := line.get()) is not done:
            if isinstance(item, BaseException):
                raise item
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()


@dataclass(frozen=True)
class Loader:
    """What it takes to turn packed images into batches for one network on one device."""

    packed: PackedImages
    norm: Normalisation
    device: torch.device
    batch_size: int

    def plain(self, rows: NDArray[np.int64]) -> Iterator[Batch]:
        """The centre squares of ``rows``, in that order, the last batch possibly smaller."""
        chunks = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        batches = self._batches(
            chunks, lambda i: plain_views(chunks[i], image_sizes(self.packed, chunks[i]), self.packed.image_size)
        )
        return track(batches, "predicting", len(chunks))

    def augmented(
        self, rows: NDArray[np.int64], augment: Augment, seed: int, epoch: int, first: int = 0
    ) -> Iterator[Batch]:
        """One epoch of ``rows``, shuffled and augmented, from the batch number ``first`` on.

        Chance is a function of seed, epoch and batch alone, so that any batch of any epoch can be made again.
        """
        chunks = shuffled(rows, self.batch_size, seed, epoch)
        return self._batches(
            chunks,
            lambda i: random_views(
                chunks[i],
                image_sizes(self.packed, chunks[i]),
                self.packed.image_size,
                augment,
                np.random.default_rng([seed, epoch, i + 1]),
            ),
            first,
        )

    def views(self, batches: Iterable[Views]) -> Iterator[Batch]:
        """The given views, rendered."""
        read = ((views, read_canvas(self.packed, views)) for views in batches)
        for views, canvas in prefetch(read):
            sizes = image_sizes(self.packed, views.rows)
            inputs = render(canvas, views, sizes, self.packed.image_size, self.norm, self.device)
            yield inputs, _upload(torch.from_numpy(self.packed.labels[views.rows]), self.device)

    def _batches(
        self, chunks: list[NDArray[np.int64]], make: Callable[[int], Views], first: int = 0
    ) -> Iterator[Batch]:
        return self.views(make(i) for i in range(first, len(chunks)))


def batches_per_epoch(images: int, batch_size: int) -> int:
    """Batches in an epoch: whole ones only, so that no small last batch upsets BatchNorm; at least one."""
    return max(1, images // batch_size)


def shuffled(rows: NDArray[np.int64], batch_size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """One epoch's batches of row numbers: another order each epoch, the rest that fills no batch left out."""
    order = np.random.default_rng([seed, epoch, 0]).permutation(rows)
    return [order[i * batch_size : (i + 1) * batch_size] for i in range(batches_per_epoch(len(rows), batch_size))]


def activation_batches(
    activations: NDArray[np.float32],
    labels: NDArray[np.int64],
    batches: Iterable[NDArray[np.int64]],
    device: torch.device,
) -> Iterator[Batch]:
    """Batches of precomputed activations (B, F) and class numbers (B,), for the row numbers given."""
    for rows in batches:
        yield torch.from_numpy(activations[rows]).to(device), torch.from_numpy(labels[rows]).to(device)
