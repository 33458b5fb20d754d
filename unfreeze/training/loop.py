"""The training loop.

The loop is given batches, an optimizer, a schedule of rates and a validation function. The same loop trains a head on
precomputed activations, a head through a frozen backbone, or a whole network, depending on these arguments.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from unfreeze.batches.loader import Batch
from unfreeze.device import grad_scaler
from unfreeze.errors import UserError
from unfreeze.evaluation.metrics import Scores
from unfreeze.persistence.interruption import Interrupted
from unfreeze.settings.schema import Train
from unfreeze.training.checkpoints import Checkpoint, Progress
from unfreeze.training.early_stopping import until_overfitting
from unfreeze.training.history import History
from unfreeze.training.schedules import Schedule
from unfreeze.training.state import Tensors, put, trainable_state
from unfreeze.training.train_step import TrainStep

REPORT_EVERY = 10
"""Batches between two transfers of losses from the device, each of which makes the CPU wait."""


@dataclass(frozen=True)
class TrainingData:
    """Training batches, and how to validate.

    Attributes:
        batches: the batches of epoch n (from 0), from batch i (from 0) on.
        validate: returns the scores of the current model; without it there is no early stopping.
    """

    batches: Callable[[int, int], Iterable[Batch]]
    validate: Callable[[], Scores] | None = None


@dataclass(frozen=True)
class Callbacks:
    """Training callbacks, and the checkpoint.

    Attributes:
        batches: gets rows of ``iteration``, ``rate`` and ``loss``, of several batches at once.
        epoch: gets a row at the end of each epoch, after validation.
        cycle: called at the end of each cycle with its number (from 0); the model then has that cycle's weights.
        resumed: gets the progress that an earlier process has made.
        checkpoint: where to save the training's state, and to resume from; a resumed training ends with the same
            weights, bit for bit, as one that was never interrupted.
    """

    batches: Callable[[Sequence[dict[str, float]]], None] = lambda rows: None
    epoch: Callable[[dict[str, float]], None] = lambda row: None
    cycle: Callable[[int], None] = lambda number: None
    resumed: Callable[[Progress], None] = lambda progress: None
    checkpoint: Checkpoint | None = None


class Diverged(UserError):
    """The training loss became infinite or not a number.

    Attributes:
        epoch, batch: the epoch (from 0), and the batch in it (from 0), with that loss.
    """

    def __init__(self, row: dict[str, float], epoch: int, batch: int) -> None:
        super().__init__(
            f"The training loss became {row['loss']} at iteration {row['iteration']} (epoch {epoch + 1}, batch "
            f"{batch + 1}) with the rate {row['rate']:.3g}: the rate is too high. Look at the learning-rate plot and set "
            "a lower rate (lr_find.rate or unfreeze_lr_find.rate in params.yaml)."
        )
        self.epoch, self.batch = epoch, batch


def make_optimizer(groups: list[dict[str, Any]], train: Train) -> torch.optim.Optimizer:
    """The optimizer of the settings over parameter groups, each with its ``lr_scale`` (`models.parameter_groups`).

    Fused: one pass over all parameters instead of one per operation.
    """
    device = groups[0]["params"][0].device
    half = grad_scaler(device).is_enabled()
    graphs = device.type == "cuda" and not half  # a CUDA graph reads rates and step counts from GPU memory
    groups = [group | {"lr": torch.zeros((), device=device) if graphs else 0.0} for group in groups]
    if train.optimizer == "sgd":
        # Fused only without a gradient scaler: if it skips the first step, fused SGD leaves momentum uninitialized.
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=train.weight_decay, fused=not half)
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=train.weight_decay, fused=True, capturable=graphs)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every group's rate: ``rate``, the rate of the last layer group, times ``lr_scale`` (differential rates)."""
    for group in optimizer.param_groups:
        value = rate * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    rate: float,
    data: TrainingData,
    *,
    train_mode: Callable[[], object],
    stop_when_overfitting: bool = False,
    loss: nn.Module | None = None,
    callbacks: Callbacks | None = None,
) -> History:
    """Train ``model`` in place along ``schedule``.

    Args:
        model: maps a batch's inputs to logits (B, classes).
        optimizer: over the parameters that train; its groups may carry ``lr_scale``.
        schedule: factor on the rate for every iteration, and the ends of the cycles.
        rate: the top rate, of the last layer group.
        data: batches, and how to validate.
        train_mode: puts the model's trained parts into training mode; called before every epoch.
        stop_when_overfitting: treat the number of cycles as a maximum, stop as `until_overfitting` says, and go back to
            the weights of the best cycle.
        loss: of logits (B, classes) and class numbers (B,); cross-entropy by default.
        callbacks: training callbacks, including the checkpoint to save to and to resume from.

    Raises:
        Diverged: the loss became infinite or not a number.
        Interrupted: a stop was requested; raised after the attempt to write a checkpoint.
    """
    callbacks = callbacks or Callbacks()
    checkpoint, validate = callbacks.checkpoint, data.validate
    train_mode()
    weights, step = trainable_state(model), TrainStep(model, optimizer, loss or nn.CrossEntropyLoss())
    at = (checkpoint.load(weights, optimizer, step.scaler) if checkpoint else None) or Progress()
    if at.iteration:
        callbacks.resumed(at)

    def scored() -> Scores | None:
        """Validate. A stop request interrupts the validation, which may take long and does not change the model."""
        if validate is None or checkpoint is None:
            return validate() if validate else None
        try:
            with checkpoint.deferring(False):
                return validate()
        except Interrupted:
            checkpoint.save(weights, optimizer, at, step.scaler)
            raise

    with checkpoint.deferring() if checkpoint else nullcontext():
        while not at.done:
            train_mode()
            waiting: list[tuple[float, torch.Tensor]] = []
            for batch in data.batches(at.epoch, at.batch):
                now = rate * float(schedule.factors[at.iteration])
                set_rate(optimizer, now)
                waiting.append((now, step(batch)))
                at.iteration, at.batch = at.iteration + 1, at.batch + 1
                due = checkpoint is not None and checkpoint.due()
                if due or len(waiting) == REPORT_EVERY:
                    _report(waiting, at, callbacks)
                if checkpoint and due:
                    checkpoint.save(weights, optimizer, at, step.scaler)
            _report(waiting, at, callbacks)
            _judge(weights, schedule, scored(), stop_when_overfitting, at, callbacks)
            if checkpoint and at.done:
                checkpoint.save(weights, optimizer, at, step.scaler)
    if at.best:
        put(weights, at.best)
    return at.history


def _judge(
    weights: Tensors,
    schedule: Schedule,
    scores: Scores | None,
    stop_when_overfitting: bool,
    at: Progress,
    callbacks: Callbacks,
) -> None:
    """Record an epoch's losses and metrics; at the end of a cycle, update the best cycle and apply early stopping."""
    rows = at.history.batches[at.iteration - at.batch :]
    cycle = sum(at.epoch >= end for end in schedule.cycle_ends)
    row = {"epoch": at.epoch, "cycle": cycle, "train_loss": float(np.mean([row["loss"] for row in rows]))}
    if scores is not None:
        row |= {"valid_loss": scores.loss, "valid_accuracy": scores.accuracy}
        if scores.calibrated_loss is not None:
            row["valid_calibrated_loss"] = scores.calibrated_loss
    row["rate"] = max(batch["rate"] for batch in rows)
    at.history.epochs.append(row)
    callbacks.epoch(row)
    at.epoch, at.batch = at.epoch + 1, 0
    at.done = at.epoch == schedule.epochs
    if at.epoch not in schedule.cycle_ends:
        return
    callbacks.cycle(cycle)
    at.history.best_cycle = cycle
    if stop_when_overfitting and scores is not None:
        ends = [at.history.epochs[end - 1] for end in schedule.cycle_ends if end <= at.epoch]
        stop, at.history.best_cycle = until_overfitting(
            [r["train_loss"] for r in ends], [r["valid_calibrated_loss"] for r in ends]
        )
        if at.history.best_cycle == cycle:
            at.best = {name: tensor.clone() for name, tensor in weights.items()}
        at.done = at.done or stop


def _report(waiting: list[tuple[float, torch.Tensor]], at: Progress, callbacks: Callbacks) -> None:
    """Fetch losses from the device, record them, and call the callbacks. Raises Diverged if a loss is not finite."""
    if not waiting:
        return
    losses = torch.stack([loss for _, loss in waiting]).tolist()
    first = at.iteration - len(waiting)
    rows = [
        {"iteration": first + i, "rate": rate, "loss": loss}
        for i, ((rate, _), loss) in enumerate(zip(waiting, losses, strict=True))
    ]
    waiting.clear()
    at.history.batches += rows
    callbacks.batches(rows)
    for row in rows:
        if not math.isfinite(row["loss"]):
            raise Diverged(row, at.epoch, int(row["iteration"]) - at.iteration + at.batch)
