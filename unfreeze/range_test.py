"""The LR range test of a model: the learning-rate finder's sweep, which goes on after an interruption and leaves no trace."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext

import pandas as pd
import torch
from torch import nn

from unfreeze.batches import Batch
from unfreeze.checkpoints import Checkpoint, Progress, trainable_state
from unfreeze.lr_finder import lr_find
from unfreeze.preserve import preserved
from unfreeze.settings import LRFind
from unfreeze.train_step import TrainStep
from unfreeze.training import set_rate

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
