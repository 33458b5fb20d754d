"""The work of both sides: the same images, split, backbone, weights, image size, batches and epochs."""

import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from unfreeze.batches.loader import Loader, Normalisation, images_per_batch
from unfreeze.data.packed import open_packed
from unfreeze.data.packing import pack
from unfreeze.data.sources import read_source
from unfreeze.device import best_device, to_device
from unfreeze.models.backbones import Backbone, create_backbone
from unfreeze.models.classifier import Classifier, Head
from unfreeze.settings.overrides import apply_overrides
from unfreeze.settings.schema import Settings, load_settings

ROOT = Path(__file__).parent.parent
SWEEP: dict[str, Any] = {"start": 1e-6, "end": 1e-4}
"""Rates of a timed LR range test, too low for the loss to diverge, so that both sides process every batch."""


@dataclass(frozen=True)
class Work:
    """Images and settings of a measurement.

    Attributes:
        folder: folder of the packed images.
        settings: all settings.
        views: number of views that TTA averages with the plain image.
        sweep: number of batches of an LR range test.
        workers: number of fastai's loader processes.
    """

    folder: Path
    settings: Settings
    views: int = 4
    sweep: int = 40
    workers: int = 0

    @property
    def source(self) -> str:
        """Source of the images."""
        return self.settings.data.source

    @property
    def frozen_epochs(self) -> int:
        """Epochs of the augmented head."""
        return self.settings.train_augmented.epochs

    @property
    def full_epochs(self) -> int:
        """Maximum number of epochs of the whole network."""
        return self.settings.train_full.epochs

    @property
    def image_size(self) -> int:
        """Side of the square input images in pixels."""
        return self.settings.data.image_size


def with_epochs(work: Work, frozen: int, full: int) -> Work:
    """Work with ``frozen`` epochs of the augmented head and ``full`` epochs of the whole network in one cycle."""
    head = dataclasses.replace(work.settings.train_augmented, cycles=frozen, cycle_len=1, cycle_mult=1)
    whole = dataclasses.replace(
        work.settings.train_full, cycles=1, cycle_len=full, cycle_mult=1, until_overfitting=False
    )
    settings = dataclasses.replace(work.settings, train_augmented=head, train_full=whole)
    return dataclasses.replace(work, settings=settings)


def with_seed(work: Work, seed: int) -> Work:
    """Work with another seed of training. The split stays the same, as the images are already packed."""
    return dataclasses.replace(work, settings=dataclasses.replace(work.settings, seed=seed))


def changed_settings(file: Path, changes: list[str]) -> Settings:
    """Settings of `params.yaml` with changes (``key=value``); the changed settings are written to ``file``."""
    shutil.copy(ROOT / "params.yaml", file)
    apply_overrides(file, changes)
    return load_settings(file)


def make_work(folder: Path, settings: Settings) -> Work:
    """Pack and split the images once, for both sides."""
    pack(read_source(settings.data.source), folder, settings.data, settings.seed)
    return Work(folder, settings)


def files(work: Work) -> pd.DataFrame:
    """Table of the images: path, file, and the label and split that packing determined."""
    table = open_packed(work.folder).table[["path", "label", "split"]]
    return table.merge(read_source(work.source)[["path", "file"]], on="path")


def backbone(work: Work) -> Backbone:
    """The network that both sides fine-tune, with the same weights on every call."""
    torch.manual_seed(0)
    return create_backbone(work.settings.backbone.name, work.settings.backbone.weights, work.image_size)


def batch_size(work: Work) -> int:
    """Images per batch, of both sides."""
    return images_per_batch(work.settings.batch_size, open_packed(work.folder))


def classifier(work: Work, seed: int) -> tuple[Classifier, Loader]:
    """unfreeze's network with a new head, on the device, and a loader for it."""
    network, device = backbone(work), best_device()
    packed = open_packed(work.folder)
    torch.manual_seed(seed)
    head = Head(network.num_features, len(packed.classes), work.settings.head.dropout)
    loader = Loader(packed, Normalisation(network.mean, network.std), device, batch_size(work))
    return to_device(Classifier(network, head), device), loader


def timed(what: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    what()
    return time.perf_counter() - start
