"""The weights at the end of each cycle of the whole network's training, one file each, and their average."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from unfreeze.data.packed import PackedImages
from unfreeze.evaluation.soup import average_weights
from unfreeze.models.classifier import Classifier
from unfreeze.models.weights import load_classifier, save_classifier
from unfreeze.settings.schema import Augment


def keep_cycles(folder: Path, model: Classifier, packed: PackedImages, augment: Augment) -> Callable[[int], None]:
    """A callback that writes the model to ``<folder>/<number>.safetensors`` at the end of a cycle, numbered from 1."""
    folder.mkdir(parents=True, exist_ok=True)

    def save(number: int) -> None:
        weights = folder / f"{number + 1}.safetensors"
        save_classifier(model, weights, packed.classes, packed.image_size, augment, packed.grey_range)

    return save


def average_cycles(folder: Path, cycles: Sequence[int]) -> dict[str, torch.Tensor]:
    """State dict with the average of the weights at the end of the given cycles, numbered from 1."""
    return average_weights([load_classifier(folder / f"{number}.safetensors")[0].state_dict() for number in cycles])
