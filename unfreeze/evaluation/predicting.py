"""Predictions: plain, and averaged over views (test-time augmentation)."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from unfreeze.acceleration.frozen import frozen_copy
from unfreeze.batches.loader import Batch, Loader
from unfreeze.batches.views import Views, tta_views
from unfreeze.device import autocast, deterministically
from unfreeze.models.backbones import Backbone
from unfreeze.models.classifier import Head, SeveralHeads
from unfreeze.persistence.resumable import ResumableFile
from unfreeze.progress import track
from unfreeze.settings.schema import Augment

logger = logging.getLogger("unfreeze")

Probabilities = NDArray[np.float32]

PART = 4096
"""Number of views that are averaged at once: all of them may not fit into memory."""
TOGETHER = 8
"""Batches whose predictions are fetched and stored together, because the CPU waits for the device at each fetch."""


def predict(model: nn.Module, batches: Iterable[Batch], fast: nn.Module | None = None) -> Probabilities:
    """Probabilities (N, ..., C) of the inputs of ``batches``, in their order. Other arguments as for `infer`."""
    return torch.cat([logits.softmax(-1) for logits, _ in infer(model, batches, fast)]).cpu().numpy()


def infer(network: nn.Module, batches: Iterable[Batch], fast: nn.Module | None = None) -> Iterator[Batch]:
    """Run a network on batches, as inference.

    Args:
        network: maps inputs to one tensor; left in eval mode.
        batches: of its inputs.
        fast: a frozen copy of the network; by default one made for the first batch.

    Yields:
        Outputs (B, ...) float32 and class numbers (B,).
    """
    network.eval()
    for inputs, labels in batches:
        fast = frozen_copy(network, inputs) if fast is None else fast
        with torch.no_grad(), autocast(inputs.device):
            output = deterministically(partial(fast, inputs))
        yield output.float(), labels


def with_temperature(probabilities: NDArray[Any], temperature: float) -> Probabilities:
    """The probabilities (N, C) after dividing the logits by a temperature."""
    if temperature == 1:
        return probabilities
    logits = np.log(np.maximum(probabilities.astype(float), np.finfo(np.float32).tiny)) / temperature
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return (powers / powers.sum(1, keepdims=True)).astype(np.float32)


@dataclass(frozen=True)
class ViewPredictions:
    """Probabilities of images and of their augmented views.

    Attributes:
        plain: (N, C) of the plain centre squares.
        views: (V, C) of the views.
        owner: (V,) number of each view's image (0 to N - 1); every image has at least one view.
    """

    plain: Probabilities
    views: Probabilities
    owner: NDArray[np.int64]

    def averaged(self, temperature: float = 1.0) -> tuple[Probabilities, Probabilities]:
        """Probabilities (N, C) of the plain images, and (N, C) averaged over each image and its views.

        The plain image has a weight of 1/2 and all its views together the other 1/2, because the plain image shows the
        object as its photographer framed it (benchmarks/notes/choices.md).

        Args:
            temperature: divisor of the logits (`unfreeze.evaluation.calibration`).
        """
        plain = with_temperature(self.plain, temperature)
        total = np.zeros(plain.shape)
        for start in range(0, len(self.owner), PART):
            part = slice(start, start + PART)
            np.add.at(total, self.owner[part], with_temperature(self.views[part], temperature))
        counts = np.bincount(self.owner, minlength=len(plain))
        return plain, ((plain + total / counts[:, None]) / 2).astype(np.float32)


def predict_tta(
    model: nn.Module,
    loader: Loader,
    rows: NDArray[np.int64],
    augment: Augment,
    views: int,
    kept: ResumableFile | None = None,
) -> ViewPredictions:
    """Test-time augmentation: probabilities of the plain image and of its augmented views, to be averaged.

    The average of probabilities over views was made popular by Krizhevsky et al. (2012). If an image is not square, its
    views together cover the whole image.

    Args:
        model: the classifier.
        loader: of the packed images.
        rows: (N,) row numbers, at least one.
        augment: augmentation that the model was trained with; the views do not exceed it.
        views: number of views beside the plain one: more if an image that is not square needs them, fewer if the
            others would be duplicates.
        kept: file to store the predictions in, and to resume from; a resumed prediction is the same, bit for bit, as
            one that was never interrupted.
    """
    owner, found = _predict_views(model, loader, rows, augment, views, kept)
    return ViewPredictions(np.array(found[len(owner) :]), found[: len(owner)], owner)


def predict_tta_of_heads(
    backbone: Backbone,
    heads: Sequence[Head],
    loader: Loader,
    rows: NDArray[np.int64],
    augment: Augment,
    views: int,
    kept: ResumableFile | None = None,
) -> list[ViewPredictions]:
    """`predict_tta` for several heads on one backbone, which computes each view once. Other arguments as there."""
    model = SeveralHeads(backbone, heads).to(loader.device)
    owner, found = _predict_views(model, loader, rows, augment, views, kept)
    of_heads = np.moveaxis(found.reshape(len(found), len(heads), -1), 1, 0)
    return [ViewPredictions(np.array(one[len(owner) :]), one[: len(owner)], owner) for one in of_heads]


def _predict_views(
    model: nn.Module,
    loader: Loader,
    rows: NDArray[np.int64],
    augment: Augment,
    views: int,
    kept: ResumableFile | None,
) -> tuple[NDArray[np.int64], Probabilities]:
    """Index in ``rows`` of each view's image (V,); a row of probabilities for each view, then for each plain image."""
    sizes = loader.packed.sizes[rows]
    plans = [tta_views(size, loader.packed.image_size, augment, views) for size in sizes]
    linear = np.concatenate([linear for linear, _ in plans])
    centre = np.concatenate([centre for _, centre in plans])
    owner = np.repeat(np.arange(len(rows)), [len(linear) for linear, _ in plans])

    starts = range(0, len(owner), loader.wide)

    def chunk(start: int) -> Views:
        part = slice(start, start + loader.wide)
        count = len(owner[part])
        ones, zeros = np.ones(count, np.float32), np.zeros(count, np.float32)
        return Views(rows[owner[part]], linear[part], centre[part], ones, zeros)

    def batches(first: int) -> Iterator[Batch]:
        # The views come first: they are the majority, and the first batch determines the memory layout of the weights.
        seen = track(loader.views(map(chunk, starts[first:])), "views", len(starts), first)
        return chain(seen, loader.plain(rows[max(0, first - len(starts)) * loader.wide :]))

    if kept is None:
        found = predict(model, batches(0))
    else:
        _predict_on(model, batches, kept)
        found = np.memmap(kept.path, np.float32, "r")  # views times images may not fit into memory
    return owner, found.reshape(len(owner) + len(rows), -1)


def _predict_on(model: nn.Module, batches: Callable[[int], Iterator[Batch]], kept: ResumableFile) -> None:
    """Predict the batches that are not in the file yet, and append their probabilities."""
    done, fast = sum(kept.notes), None
    if done:
        logger.info("%d batches were predicted before an interruption", done)
        fast = frozen_copy(model, next(batches(0))[0])  # for a full batch; the remaining ones may be smaller
    outputs = infer(model, batches(done), fast)
    while some := list(islice(outputs, TOGETHER)):
        kept.append(torch.cat([logits.softmax(-1) for logits, _ in some]).cpu().numpy().tobytes(), len(some))
    kept.keep()


def backbone_activations(backbone: Backbone, loader: Loader, first: int = 0) -> Iterator[NDArray[np.float32]]:
    """Pooled activations of the frozen backbone for the plain view of every packed image, batch by batch.

    Args:
        backbone: the network.
        loader: of the packed images.
        first: number of the first image (from 0); a multiple of ``loader.wide``, where a batch begins.

    Yields:
        (B, F) in the order of the images; the activations of an image do not depend on ``first``.
    """
    rows = np.arange(len(loader.packed))
    [(whole, _)] = loader.plain(rows[: loader.wide])  # a full batch; the remaining ones may be smaller
    outputs = infer(backbone, loader.plain(rows[first:]), frozen_copy(backbone, whole))
    yield from _fetched(activations for activations, _ in outputs)


def _fetched(outputs: Iterable[torch.Tensor], ahead: int = 3) -> Iterator[NDArray[np.float32]]:
    """Outputs as arrays, in their order; a GPU computes the next ones while one is copied to the CPU."""
    waiting: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()
    for output in outputs:
        if output.is_cuda:
            host = torch.empty(output.shape, dtype=output.dtype, pin_memory=True).copy_(output, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            waiting.append((host, arrived))
        else:
            waiting.append((output, None))
        if len(waiting) > ahead:
            yield _arrived(*waiting.popleft())
    while waiting:
        yield _arrived(*waiting.popleft())


def _arrived(host: torch.Tensor, arrived: torch.cuda.Event | None) -> NDArray[np.float32]:
    if arrived is not None:
        arrived.synchronize()
    return host.numpy()
