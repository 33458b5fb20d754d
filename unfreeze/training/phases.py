"""The recipe's three trainings, each a function: head, augmented head, whole network.

The steps call them one by one; the step `retrain` replays all three with what was found.
"""

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from unfreeze.acceleration.fast_training import fast_training
from unfreeze.acceleration.frozen import frozen_copy
from unfreeze.batches.loader import Batch, Loader, activation_batches, batches_per_epoch, shuffled
from unfreeze.errors import UserError
from unfreeze.evaluation.metrics import Scores, score
from unfreeze.evaluation.predicting import infer, predict
from unfreeze.models.classifier import Classifier
from unfreeze.models.freezing import decay_groups, freeze_to, parameter_groups, set_train_mode
from unfreeze.progress import track
from unfreeze.settings.schema import Augment, Train, TrainAugmented, TrainFull, TrainHead, Unfreeze
from unfreeze.training.checkpoints import Checkpoint
from unfreeze.training.history import History
from unfreeze.training.loop import Diverged, Listener, fit, make_optimizer
from unfreeze.training.schedules import Schedule, make_schedule

Rows = NDArray[np.int64]
HEAD = 2
"""`freeze_to` this layer group and only the head trains: two groups of backbone come before it."""


def derive_seed(seed: int, name: str) -> int:
    """A seed of its own for one purpose, so that no step's chance depends on another step's."""
    return seed ^ zlib.crc32(name.encode())


def fit_head(
    head: nn.Module,
    activations: NDArray[np.float32],
    labels: NDArray[np.int64],
    train_rows: Rows,
    valid_rows: Rows,
    rate: float,
    settings: TrainHead,
    train: Train,
    batch_size: int,
    seed: int,
    device: Any,
    listener: Listener | None = None,
    checkpoint: Checkpoint | None = None,
) -> History:
    """Train the head on precomputed activations.

    Args:
        head: maps activations (B, F) to logits; trained in place.
        activations: (N, F), row i belongs to packed image i.
        labels: (N,) class numbers.
        train_rows, valid_rows: row numbers; no validation where ``valid_rows`` is empty.
        rate: top learning rate, annealed once along a cosine.
        settings: number of epochs.
        train: optimizer and its friends.
        batch_size: images per batch.
        seed: of the order of images.
        device: where to compute.
        listener: whom to tell.
        checkpoint: where to note how far the training has come, and to go on from.
    """
    own = derive_seed(seed, "train_head")
    schedule = make_schedule("sgdr", 1, settings.epochs, 1, batches_per_epoch(len(train_rows), batch_size))

    def epochs(epoch: int, first: int) -> Iterator[Batch]:
        chunks = shuffled(train_rows, batch_size, own, epoch)
        return activation_batches(activations, labels, chunks[first:], device)

    def validate() -> Scores:
        probabilities = predict(head, activation_batches(activations, labels, [valid_rows], device))
        return score(probabilities, labels[valid_rows])

    return fit(
        head,
        make_optimizer(decay_groups(head.parameters()), train),
        schedule,
        rate,
        epochs,
        train_mode=head.train,
        validate=validate if len(valid_rows) else None,
        label_smoothing=train.label_smoothing,
        listener=listener,
        checkpoint=checkpoint,
    )


def fit_augmented(
    model: Classifier,
    loader: Loader,
    train_rows: Rows,
    valid_rows: Rows,
    rate: float,
    settings: TrainAugmented,
    augment: Augment,
    train: Train,
    seed: int,
    listener: Listener | None = None,
    checkpoint: Checkpoint | None = None,
) -> History:
    """Train the head on augmented images through the frozen backbone. Arguments as for `fit_head`.

    The backbone is inference, for two batches at a time, and sees the validation images once.
    """
    freeze_to(model, HEAD)
    own, head, size = derive_seed(seed, "train_augmented"), model.head, loader.batch_size
    schedule = _schedule(settings, loader, train_rows)
    frozen = frozen_copy(
        model.backbone, _example(loader, train_rows, min(2, batches_per_epoch(len(train_rows), size)) * size)
    )
    valid: list[Batch] = []

    def epochs(epoch: int, first: int) -> Iterator[Batch]:
        skipped = first % 2  # so that the same two come together whatever batch it begins with
        pairs = loader.augmented(train_rows, augment, own, epoch, first - skipped, together=2)
        batches = (
            batch for x, y in infer(frozen, pairs, frozen) for batch in zip(x.split(size), y.split(size), strict=True)
        )
        return _tracked(islice(batches, skipped, None), schedule, epoch, first)

    def validate() -> Scores:
        valid[:] = valid or infer(frozen, loader.plain(valid_rows), frozen)
        return score(predict(head, valid), loader.packed.labels[valid_rows])

    with _named_images(loader, train_rows, own):
        return fit(
            head, make_optimizer(decay_groups(head.parameters()), train), schedule, rate, epochs,
            train_mode=head.train, validate=validate if len(valid_rows) else None,
            label_smoothing=train.label_smoothing, listener=listener, checkpoint=checkpoint,
        )  # fmt: skip


def fit_full(
    model: Classifier,
    loader: Loader,
    train_rows: Rows,
    valid_rows: Rows,
    rate: float,
    settings: TrainFull,
    unfreeze: Unfreeze,
    augment: Augment,
    train: Train,
    seed: int,
    listener: Listener | None = None,
    checkpoint: Checkpoint | None = None,
) -> History:
    """Train the whole network with differential rates. Arguments as for `fit_head`; ``rate`` is the head's."""
    own = derive_seed(seed, "train_full")
    schedule = _schedule(settings, loader, train_rows)

    def epochs(epoch: int, first: int) -> Iterator[Batch]:
        batches = loader.augmented(train_rows, augment, own, epoch, first)
        return _tracked(batches, schedule, epoch, first)

    def validate() -> Scores:
        return score(predict(model, loader.plain(valid_rows)), loader.packed.labels[valid_rows])

    with unfrozen(model, loader, train_rows, unfreeze) as groups, _named_images(loader, train_rows, own):
        return fit(
            model, make_optimizer(groups, train), schedule, rate, epochs,
            train_mode=lambda: set_train_mode(model), validate=validate if len(valid_rows) else None,
            stop_when_overfitting=settings.until_overfitting, label_smoothing=train.label_smoothing,
            listener=listener, checkpoint=checkpoint,
        )  # fmt: skip


@contextmanager
def unfrozen(model: Classifier, loader: Loader, rows: Rows, unfreeze: Unfreeze) -> Iterator[list[dict[str, Any]]]:
    """Open the network up as the settings say, ready to train on the images ``rows``; fast while it lasts.

    Yields:
        The parameter groups, with differential rates, for an optimizer.
    """
    freeze_to(model, unfreeze.freeze_to, unfreeze.bn_freeze)
    set_train_mode(model)
    with fast_training(model.backbone, _example(loader, rows, loader.batch_size)):
        yield parameter_groups(model, unfreeze.lr_ratio)


def _example(loader: Loader, rows: Rows, count: int) -> torch.Tensor:
    [(images, _)] = loader.plain(rows[:count])
    return images


def _schedule(settings: TrainAugmented | TrainFull, loader: Loader, rows: Rows) -> Schedule:
    count = batches_per_epoch(len(rows), loader.batch_size)
    return make_schedule(settings.schedule, settings.cycles, settings.cycle_len, settings.cycle_mult, count)


def _tracked(batches: Iterable[Batch], schedule: Schedule, epoch: int, first: int) -> Iterator[Batch]:
    return track(batches, f"epoch {epoch + 1}/{schedule.epochs}", len(schedule.factors) // schedule.epochs, first)


@contextmanager
def _named_images(loader: Loader, rows: Rows, seed: int) -> Iterator[None]:
    """Name the images of the batch at which the loss became infinite or not a number."""
    try:
        yield
    except Diverged as error:
        chunk = shuffled(rows, loader.batch_size, seed, error.epoch)[error.batch]
        names = "\n  ".join(map(str, loader.packed.table["path"].iloc[chunk]))
        raise UserError(f"{error} The batch's images, should it be them:\n  {names}") from None
