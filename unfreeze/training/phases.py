"""The recipe's three trainings, each a function: head, augmented head, whole network.

The steps call them one by one; the step `retrain` repeats them with the rates, cycles and epochs found before.
"""

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from unfreeze.evaluation.calibration import score_calibrated
from unfreeze.evaluation.metrics import Scores, score
from unfreeze.evaluation.predicting import infer, predict
from unfreeze.models.classifier import Classifier, Head
from unfreeze.models.freezing import decay_groups, freeze_to, parameter_groups, set_train_mode
from unfreeze.progress import track
from unfreeze.settings.schema import Augment, Train, TrainAugmented, TrainFull, TrainHead, Unfreeze
from unfreeze.training.balance import make_loss, sampling_probabilities
from unfreeze.training.history import History
from unfreeze.training.loop import Callbacks, Diverged, TrainingData, fit, make_optimizer
from unfreeze.training.schedules import Schedule, make_schedule

Rows = NDArray[np.int64]
HEAD = 2
"""Number of the head's layer group, for `freeze_to`; groups 0 and 1 are the backbone's."""


def derive_seed(seed: int, name: str) -> int:
    """A separate seed for each purpose, so that the random state of a step does not depend on other steps."""
    return seed ^ zlib.crc32(name.encode())


@dataclass(frozen=True)
class Activations:
    """Precomputed activations to train the head on.

    Attributes:
        features: (N, F), row i belongs to packed image i.
        labels: (N,) class numbers.
        train, valid: row numbers; no validation if ``valid`` is empty.
        batch_size: images per batch.
        seed: of the order of images.
        device: where to compute.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    train: Rows
    valid: Rows
    batch_size: int
    seed: int
    device: torch.device


@dataclass(frozen=True)
class Images:
    """Packed images to train on.

    Attributes:
        loader: makes batches of them.
        train, valid: row numbers; no validation if ``valid`` is empty.
        augment: augmentation of the training images.
        seed: of the order of images and of their views.
    """

    loader: Loader
    train: Rows
    valid: Rows
    augment: Augment
    seed: int

    def loss(self, train: Train) -> nn.CrossEntropyLoss:
        """The loss of the settings, for the classes of the training images."""
        labels, classes = self.loader.packed.labels[self.train], len(self.loader.packed.classes)
        return make_loss(train, labels, classes, self.loader.device)

    def augmented(self, train: Train, seed: int, epoch: int, first: int = 0, together: int = 1) -> Iterator[Batch]:
        """One epoch of augmented training images, sampled as in the settings; arguments as for `Loader.augmented`."""
        return self.loader.augmented(self.train, self.augment, seed, epoch, first, together, self.probabilities(train))

    def probabilities(self, train: Train) -> NDArray[np.float64] | None:
        """Sampling probability of each training image, as `sampling_probabilities` returns it."""
        return sampling_probabilities(train, self.loader.packed.labels[self.train])


def fit_head(
    head: Head,
    data: Activations,
    rate: float,
    settings: TrainHead,
    train: Train,
    callbacks: Callbacks | None = None,
) -> History:
    """Train the head on precomputed activations.

    Args:
        head: maps activations (B, F) to logits; trained in place.
        data: the activations.
        rate: top learning rate, annealed once along a cosine.
        settings: number of epochs.
        train: the optimizer and its settings.
        callbacks: training callbacks, including the checkpoint.
    """
    seed = derive_seed(data.seed, "train_head")
    schedule = make_schedule("sgdr", 1, settings.epochs, 1, batches_per_epoch(len(data.train), data.batch_size))

    labels = data.labels[data.train]
    probabilities = sampling_probabilities(train, labels)

    def batches(epoch: int, first: int) -> Iterator[Batch]:
        chunks = shuffled(data.train, data.batch_size, seed, epoch, probabilities)
        return activation_batches(data.features, data.labels, chunks[first:], data.device)

    def validate() -> Scores:
        found = predict(head, activation_batches(data.features, data.labels, [data.valid], data.device))
        return score(found, data.labels[data.valid])

    return fit(
        head,
        make_optimizer(decay_groups(head.parameters()), train),
        schedule,
        rate,
        TrainingData(batches, validate if len(data.valid) else None),
        train_mode=head.train,
        loss=make_loss(train, labels, head.classes, data.device),
        callbacks=callbacks,
    )


def fit_augmented(
    model: Classifier,
    data: Images,
    rate: float,
    settings: TrainAugmented,
    train: Train,
    callbacks: Callbacks | None = None,
) -> History:
    """Train the head on augmented images through the frozen backbone. Arguments as for `fit_head`.

    The backbone runs as inference: on as many training batches at a time as fit into a batch for inference
    (`Loader.wide`), and on the validation images only once.
    """
    freeze_to(model, HEAD)
    loader, seed, head = data.loader, derive_seed(data.seed, "train_augmented"), model.head
    size, schedule = loader.batch_size, _schedule(settings, data)
    together = min(loader.wide // size, batches_per_epoch(len(data.train), size))
    frozen = frozen_copy(model.backbone, _example(loader, data.train, together * size))
    valid: list[Batch] = []

    def batches(epoch: int, first: int) -> Iterator[Batch]:
        skipped = first % together  # so that the same batches are joined, whichever is the first
        joined = data.augmented(train, seed, epoch, first - skipped, together)
        parts = (
            batch for x, y in infer(frozen, joined, frozen) for batch in zip(x.split(size), y.split(size), strict=True)
        )
        return _tracked(islice(parts, skipped, None), schedule, epoch, first)

    def validate() -> Scores:
        valid[:] = valid or infer(frozen, loader.plain(data.valid), frozen)
        return score(predict(head, valid), loader.packed.labels[data.valid])

    with _named_images(data, train, seed):
        return fit(
            head,
            make_optimizer(decay_groups(head.parameters()), train),
            schedule,
            rate,
            TrainingData(batches, validate if len(data.valid) else None),
            train_mode=head.train,
            loss=data.loss(train),
            callbacks=callbacks,
        )


def fit_full(
    model: Classifier,
    data: Images,
    rate: float,
    settings: TrainFull,
    unfreeze: Unfreeze,
    train: Train,
    callbacks: Callbacks | None = None,
) -> History:
    """Train the whole network with differential rates. Arguments as for `fit_head`; ``rate`` is the head's."""
    loader, seed = data.loader, derive_seed(data.seed, "train_full")
    schedule = _schedule(settings, data)

    def batches(epoch: int, first: int) -> Iterator[Batch]:
        augmented = data.augmented(train, seed, epoch, first)
        return _tracked(augmented, schedule, epoch, first)

    copied: nn.Module | None = None

    def validate() -> Scores:
        nonlocal copied
        copied = frozen_copy(model, _example(loader, data.valid, loader.wide), copied)
        return score_calibrated(predict(model, loader.plain(data.valid), copied), loader.packed.labels[data.valid])

    with unfrozen(model, loader, data.train, unfreeze) as groups, _named_images(data, train, seed):
        return fit(
            model,
            make_optimizer(groups, train),
            schedule,
            rate,
            TrainingData(batches, validate if len(data.valid) else None),
            train_mode=lambda: set_train_mode(model),
            stop_when_overfitting=settings.until_overfitting,
            loss=data.loss(train),
            callbacks=callbacks,
        )


@contextmanager
def unfrozen(model: Classifier, loader: Loader, rows: Rows, unfreeze: Unfreeze) -> Iterator[list[dict[str, Any]]]:
    """Unfreeze the network according to the settings, for training on the images ``rows`` with `fast_training`.

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


def _schedule(settings: TrainAugmented | TrainFull, data: Images) -> Schedule:
    count = batches_per_epoch(len(data.train), data.loader.batch_size)
    warmup = settings.warmup if isinstance(settings, TrainFull) else 0.0
    return make_schedule(settings.schedule, settings.cycles, settings.cycle_len, settings.cycle_mult, count, warmup)


def _tracked(batches: Iterable[Batch], schedule: Schedule, epoch: int, first: int) -> Iterator[Batch]:
    return track(batches, f"epoch {epoch + 1}/{schedule.epochs}", len(schedule.factors) // schedule.epochs, first)


@contextmanager
def _named_images(data: Images, train: Train, seed: int) -> Iterator[None]:
    """If the loss becomes infinite or NaN, name the images of the batch in the error."""
    try:
        yield
    except Diverged as error:
        chunk = shuffled(data.train, data.loader.batch_size, seed, error.epoch, data.probabilities(train))[error.batch]
        names = "\n  ".join(map(str, data.loader.packed.table["path"].iloc[chunk]))
        raise UserError(f"{error} The batch's images, in case they are the cause:\n  {names}") from None
