"""The LR range test of a model: raise the rate batch by batch until the loss diverges.

The sweep goes on after an interruption and leaves no trace.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import accumulate

import numpy as np
import pandas as pd
import torch
from torch import nn

from unfreeze.batches.loader import Batch
from unfreeze.errors import UserError
from unfreeze.progress import track
from unfreeze.settings.schema import LRFind
from unfreeze.training.checkpoints import Checkpoint, Progress
from unfreeze.training.loop import set_rate
from unfreeze.training.lr_curve import DIVERGED, SMALL, Floats, smooth
from unfreeze.training.state import preserved, trainable_state
from unfreeze.training.train_step import TrainStep

logger = logging.getLogger("unfreeze")


def range_test(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int, int], Iterable[Batch]],
    settings: LRFind,
    checkpoint: Checkpoint | None = None,
) -> pd.DataFrame:
    """LR range test: train on one batch after another, over as many epochs as it takes, and leave no trace.

    Labels are not smoothed, whatever training does: the loss of a perfect network would not be 0, by which `suggest` and the
    end of the sweep go.

    Args:
        model, optimizer: what is trained, in training mode, and left as it was.
        batches: those of epoch n (from 0), from batch i (from 0) on.
        settings: the sweep's ends and its length.
        checkpoint: where to note how far the sweep has come, and to go on from, as in `fit`.

    Returns:
        The curve, as `lr_find` gives it.
    """
    with preserved(model, optimizer), checkpoint.deferring() if checkpoint else nullcontext():
        weights = trainable_state(model)
        at = (checkpoint.load(weights, optimizer) if checkpoint else None) or Progress()
        if at.iteration:
            logger.info("goes on at batch %d of %d, from a checkpoint", at.iteration + 1, settings.iterations)
        line, step = _endless(batches, at), TrainStep(model, optimizer, label_smoothing=0.0)

        def train_at(rate: float) -> float:
            set_rate(optimizer, rate)
            loss = float(step(next(line)))
            at.history.batches.append({"iteration": at.iteration, "rate": rate, "loss": loss})
            at.iteration, at.batch = at.iteration + 1, at.batch + 1
            if checkpoint and checkpoint.due():
                checkpoint.save(weights, optimizer, at)
            return loss

        before = [row["loss"] for row in at.history.batches]
        return lr_find(train_at, settings.start, settings.end, settings.iterations, before)


def _endless(batches: Callable[[int, int], Iterable[Batch]], at: Progress) -> Iterator[Batch]:
    while True:
        yield from batches(at.epoch, at.batch)
        at.epoch, at.batch = at.epoch + 1, 0


def exponential_rates(start: float, end: float, iterations: int) -> Floats:
    """Rates from ``start`` to ``end``, each the same multiple of the one before, (iterations,)."""
    return np.geomspace(start, end, iterations)


def lr_find(
    train_at: Callable[[float], float], start: float, end: float, iterations: int, before: Sequence[float] = ()
) -> pd.DataFrame:
    """Sweep the rate exponentially, a training batch at each, until the loss diverges.

    It diverges when it is not finite, or its running mean exceeds four times the lowest one so far, and most of the last
    three losses do. The caller restores what the training changed (`unfreeze.training.state.preserved`).

    Args:
        train_at: trains on the next batch at a rate, and returns its loss.
        start, end: ends of the sweep.
        iterations: batches in the whole sweep.
        before: losses of its first batches, where an interrupted sweep goes on.

    Returns:
        Columns rate, loss and smoothed; one row per batch with a finite loss.

    Raises:
        UserError: the loss diverged in the first tenth of the sweep, so that there is no curve to judge by.
    """
    rates, losses = exponential_rates(start, end, iterations), list(before)
    for rate in track(rates[len(losses) :], "learning rates", iterations, len(losses)):
        if _diverged(losses):
            break
        losses.append(train_at(float(rate)))
    curve = losses[:-1] if not math.isfinite(losses[-1]) else losses
    if _diverged(losses) and len(curve) < max(4, iterations // 10):
        rate = rates[len(losses) - 1]
        raise UserError(
            f"The learning-rate finder's loss diverged at once, at the rate {rate:.3g}: lower lr_find.start (or "
            f"unfreeze_lr_find.start) in params.yaml, to {rate / 100:.0e} or so."
        )
    return pd.DataFrame({"rate": rates[: len(curve)], "loss": curve, "smoothed": smooth(np.array(curve))})


def _diverged(losses: Sequence[float]) -> bool:
    """Whether the last loss is not finite, or their running mean so many times the lowest that it was (`DIVERGED`), and not
    for the sake of a single batch: of three images one mistake would do."""
    if losses and not math.isfinite(losses[-1]):
        return True
    means = list(accumulate(losses, lambda mean, loss: 0.7 * mean + 0.3 * loss))
    limit = DIVERGED * max(min(means, default=0.0), SMALL)
    return bool(means) and min(means[-1], float(np.median(losses[-3:]))) > limit
