"""The LR range test of a model: raise the rate batch by batch until the loss diverges.

An interrupted sweep can be resumed. At its end model, optimizer and random state are restored.
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
from unfreeze.training.lr_curve import divergence_limit, make_curve
from unfreeze.training.state import Tensors, put, restored, rng_state, set_rng_state, trainable_state
from unfreeze.training.train_step import TrainStep, batch_loss

logger = logging.getLogger("unfreeze")

Losses = tuple[float, float]
"""A batch's loss, and its loss with the starting weights."""


def range_test(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int, int], Iterable[Batch]],
    settings: LRFind,
    classes: int,
    checkpoint: Checkpoint | None = None,
    loss: nn.Module | None = None,
) -> pd.DataFrame:
    """LR range test: train on one batch after another, over several epochs if needed, then restore the earlier state.

    Model, optimizer and random state are restored. For every batch the loss of the starting weights is computed as
    well, with the same views and dropout, which takes one more forward pass.

    Args:
        model: in training mode; restored afterwards.
        optimizer: of the model's trained parameters; restored afterwards.
        batches: the batches of epoch n (from 0), from batch i (from 0) on.
        settings: the sweep's ends and its length.
        classes: number of classes.
        checkpoint: where to save the sweep's progress, and to resume from, as in `fit`.
        loss: of logits (B, classes) and class numbers (B,); cross-entropy by default.

    Returns:
        The curve, as `lr_find` gives it.
    """
    with restored(model, optimizer), checkpoint.deferring() if checkpoint else nullcontext():
        weights = trainable_state(model)
        start = {name: tensor.clone() for name, tensor in weights.items()}
        loss = loss or nn.CrossEntropyLoss()
        step = TrainStep(model, optimizer, loss)
        at = (checkpoint.load(weights, optimizer, step.scaler) if checkpoint else None) or Progress()
        if at.iteration:
            logger.info("resumed at batch %d of %d, from a checkpoint", at.iteration + 1, settings.iterations)
        line = _endless(batches, at)

        def train_at(rate: float) -> Losses:
            batch = next(line)
            starting = _starting_loss(model, weights, start, batch, loss)
            set_rate(optimizer, rate)
            value = float(step(batch))
            at.history.batches.append({"iteration": at.iteration, "rate": rate, "loss": value, "starting": starting})
            at.iteration, at.batch = at.iteration + 1, at.batch + 1
            if checkpoint and checkpoint.due():
                checkpoint.save(weights, optimizer, at, step.scaler)
            return value, starting

        before = [(row["loss"], row["starting"]) for row in at.history.batches]
        return lr_find(train_at, settings.start, settings.end, settings.iterations, classes, before)


def _starting_loss(model: nn.Module, weights: Tensors, start: Tensors, batch: Batch, loss: nn.Module) -> float:
    """The batch's loss with the starting weights; weights and random state are restored afterwards."""
    now, chance = {name: tensor.clone() for name, tensor in weights.items()}, rng_state()
    put(weights, start)
    with torch.no_grad():
        value = float(batch_loss(model, batch, loss))
    put(weights, now)
    set_rng_state(chance)
    return value


def _endless(batches: Callable[[int, int], Iterable[Batch]], at: Progress) -> Iterator[Batch]:
    while True:
        yield from batches(at.epoch, at.batch)
        at.epoch, at.batch = at.epoch + 1, 0


def lr_find(
    train_at: Callable[[float], Losses],
    start: float,
    end: float,
    iterations: int,
    classes: int,
    before: Sequence[Losses] = (),
) -> pd.DataFrame:
    """Sweep the rate exponentially, with one training batch per rate, until the loss diverges.

    It has diverged if it is not finite, or if its change against the starting weights exceeds
    `unfreeze.training.lr_curve.divergence_limit`. The caller restores what the training changed
    (`unfreeze.training.state.restored`).

    Args:
        train_at: trains on the next batch at a rate; returns its loss, and the starting weights' loss.
        start, end: ends of the sweep.
        iterations: batches in the whole sweep.
        classes: number of classes.
        before: losses of the sweep's first batches, if an interrupted sweep is resumed.

    Returns:
        The curve, as `unfreeze.training.lr_curve.make_curve` makes it; one row per batch with a finite loss.

    Raises:
        UserError: the loss diverged in the first tenth of the sweep, so that there is no curve to judge by.
    """
    rates, losses = np.geomspace(start, end, iterations), list(before)
    for rate in track(rates[len(losses) :], "learning rates", iterations, len(losses)):
        if _diverged(losses, classes):
            break
        losses.append(train_at(float(rate)))
    curve = losses if math.isfinite(losses[-1][0]) else losses[:-1]
    if _diverged(losses, classes) and len(curve) < max(4, iterations // 10):
        rate = rates[len(losses) - 1]
        raise UserError(
            f"The learning-rate finder's loss diverged at once, at the rate {rate:.3g}: lower lr_find.start (or "
            f"unfreeze_lr_find.start) in params.yaml, to {rate / 100:.0e} or so."
        )
    loss, starting = np.array(curve, float).reshape(-1, 2).T
    return make_curve(rates[: len(curve)], loss, starting)


def _diverged(losses: Sequence[Losses], classes: int) -> bool:
    """Whether the last loss is not finite, or the running mean and the median of the last three exceed the limit.

    Both are of the change against the starting weights. The median is used because in batches of three images a single
    mistake would raise the mean by as much.
    """
    if not losses:
        return False
    if not math.isfinite(losses[-1][0]):
        return True
    changes = [loss - starting for loss, starting in losses]
    means = list(accumulate(changes, lambda mean, change: 0.7 * mean + 0.3 * change))
    limit = divergence_limit(min(means), np.array([starting for _, starting in losses]), classes)
    return min(means[-1], float(np.median(changes[-3:]))) > limit
