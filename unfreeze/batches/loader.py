"""Compose batches: images, their order and their views; `unfreeze.batches.rendering` computes their pixels."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from unfreeze.batches.rendering import (
    BatchPixels,
    Normalisation,
    find_pixels,
    gather_canvas,
    read_pixels,
    render,
    render_here,
    upload,
)
from unfreeze.batches.views import Views, joined, plain_views, random_views
from unfreeze.data.packed import PackedImages
from unfreeze.device import precision
from unfreeze.parallel import in_order
from unfreeze.progress import track
from unfreeze.settings.schema import Augment

Batch = tuple[torch.Tensor, torch.Tensor]
"""Inputs (B, ...) and class numbers (B,), on the device."""
SHARE_OF_CARD = 0.4
"""Share of a GPU's free memory that packed pixels may take."""
PIECE = 1 << 26
"""Bytes that are read at once on their way to a GPU."""
WIDE = 512 * 224 * 224
"""Pixels in a batch without gradients on a GPU; the largest activation of a ResNet-50 in half precision then has 0.8 GB."""
FEW = 1000
"""Training images below which ``batch_size: auto`` makes smaller batches (benchmarks/notes/choices.md)."""
READERS = 4
"""Threads that read batches, one each, for a GPU that does not hold all pixels."""


@dataclass(frozen=True)
class Loader:
    """Makes batches of packed images for one network on one device."""

    packed: PackedImages
    norm: Normalisation
    device: torch.device
    batch_size: int

    @property
    def wide(self) -> int:
        """Batch size without gradients: twice the training batch size; on a GPU about `WIDE` pixels if that is more.

        Larger batches take less time per image, especially on a GPU, which is idle while the kernels of a small batch
        are launched. The size does not depend on the GPU's memory, so that GPUs of the same type predict the same, bit
        for bit.
        """
        twice = 2 * self.batch_size
        return max(twice, WIDE // self.packed.image_size**2) if self.device.type == "cuda" else twice

    def plain(self, rows: NDArray[np.int64]) -> Iterator[Batch]:
        """The centre squares of ``rows``, in that order, in wide batches, the last possibly smaller."""
        chunks = [rows[i : i + self.wide] for i in range(0, len(rows), self.wide)]
        views = (plain_views(chunk, self.packed.sizes[chunk], self.packed.image_size) for chunk in chunks)
        return track(self.views(views), "predicting", len(chunks))

    def augmented(
        self,
        rows: NDArray[np.int64],
        augment: Augment,
        seed: int,
        epoch: int,
        first: int = 0,
        together: int = 1,
        probabilities: NDArray[np.float64] | None = None,
    ) -> Iterator[Batch]:
        """One epoch of ``rows``, shuffled and augmented, from the batch number ``first`` on.

        The random state depends on seed, epoch and batch only, so that any batch of any epoch can be reproduced.
        ``together`` batches are joined into one. ``probabilities`` as for `shuffled`.
        """
        chunks = shuffled(rows, self.batch_size, seed, epoch, probabilities)

        def views_of(number: int) -> Views:
            chunk, rng = chunks[number], np.random.default_rng([seed, epoch, number + 1])
            return random_views(chunk, self.packed.sizes[chunk], self.packed.image_size, augment, rng)

        numbers = range(first, len(chunks))
        return self.views(
            joined([views_of(number) for number in numbers[i : i + together]]) for i in range(0, len(numbers), together)
        )

    def views(self, batches: Iterable[Views]) -> Iterator[Batch]:
        """The given views, rendered."""
        for views, inputs in self._rendered(batches):
            yield inputs, upload(torch.from_numpy(self.packed.labels[views.rows]), self.device)

    @cached_property
    def on_card(self) -> torch.Tensor | None:
        """All packed pixels (P, 3) on the GPU.

        None if they exceed `SHARE_OF_CARD` of its free memory, or are not contiguous in the file.
        """
        count = int(self.packed.sizes.prod(1).sum())
        if 3 * count > SHARE_OF_CARD * torch.cuda.mem_get_info(self.device)[0] or not _contiguous(self.packed):
            return None
        pixels = torch.empty(3 * count, dtype=torch.uint8, device=self.device)
        piece = torch.empty(min(PIECE, 3 * count), dtype=torch.uint8, pin_memory=True)
        for start in range(0, 3 * count, PIECE):
            some = piece[: 3 * count - start]
            self.packed.read(start, some.numpy())
            pixels[start : start + len(some)] = some  # a blocking copy, so that the buffer can be filled again
        return pixels.view(-1, 3)

    def _rendered(self, batches: Iterable[Views]) -> Iterator[tuple[Views, torch.Tensor]]:
        if self.device.type == "cpu":  # a thread would not help: computing already uses all cores
            for views in batches:
                yield views, render_here(self.packed, views, self.norm, precision(self.device))
            return
        values = self.on_card
        found: Iterator[tuple[Views, BatchPixels]]
        if values is None:
            found = in_order(lambda views: (views, read_pixels(self.packed, views)), batches, 1, READERS)
        else:
            found = ((views, find_pixels(values, self.packed, views)) for views in batches)
        for views, pixels in found:
            canvas, sizes = gather_canvas(pixels, self.packed, views, self.device), self.packed.sizes[views.rows]
            yield views, render(canvas, views, sizes, self.packed.image_size, self.norm, self.device)


def _contiguous(packed: PackedImages) -> bool:
    """Whether the images follow one another from the beginning of the file, with nothing between them."""
    ends = packed.offsets + 3 * packed.sizes.prod(1)
    return bool(packed.offsets[0] == 0 and (packed.offsets[1:] == ends[:-1]).all())


def images_per_batch(batch_size: int | str, packed: PackedImages) -> int:
    """Value of the setting ``batch_size`` for these images; ``auto``: 64, or 32 with fewer than `FEW` training images.

    Images for validation do not count, also where a model is retrained on train + valid: its learning rates were found
    with batches of this size.
    """
    if isinstance(batch_size, int):
        return batch_size
    return 32 if len(packed.rows("train")) < FEW else 64


def batches_per_epoch(images: int, batch_size: int) -> int:
    """Number of batches in an epoch: full ones only, as a small last batch would disturb BatchNorm; at least one."""
    return max(1, images // batch_size)


def shuffled(
    rows: NDArray[np.int64], batch_size: int, seed: int, epoch: int, probabilities: NDArray[np.float64] | None = None
) -> list[NDArray[np.int64]]:
    """One epoch's batches of row numbers, in a different order each epoch.

    An incomplete last batch is dropped, unless it is the only one.

    With ``probabilities`` (N,), one for each row, N rows are drawn with replacement, as by torch's
    `WeightedRandomSampler`.
    """
    rng = np.random.default_rng([seed, epoch, 0])
    order = rng.permutation(rows) if probabilities is None else rng.choice(rows, len(rows), p=probabilities)
    return [order[i * batch_size : (i + 1) * batch_size] for i in range(batches_per_epoch(len(rows), batch_size))]


def activation_batches(
    activations: NDArray[np.float32],
    labels: NDArray[np.int64],
    batches: Iterable[NDArray[np.int64]],
    device: torch.device,
) -> Iterator[Batch]:
    """Batches of precomputed activations (B, F) and class numbers (B,), for the row numbers given."""
    for rows in batches:
        yield upload(torch.from_numpy(activations[rows]), device), upload(torch.from_numpy(labels[rows]), device)
