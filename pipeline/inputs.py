"""Inputs of the steps: the classifier of an earlier step, and the images."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.artifacts import artifact
from unfreeze.batches.loader import Loader, Normalisation, images_per_batch
from unfreeze.data.packed import open_packed
from unfreeze.device import to_device
from unfreeze.errors import UserError
from unfreeze.models.classifier import Classifier, Head
from unfreeze.models.weights import load_backbone, load_head


def precomputed(name: str) -> NDArray[Any]:
    """Memory-map an array of the step precompute, with a row per image.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = artifact("precompute", name)
    try:
        return np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise UserError(f"There is no {path}: run the step precompute first.") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run the recipe again.") from None


def frozen_classifier(head_of: str, batch_size: int | str, device: torch.device) -> tuple[Classifier, Loader]:
    """The pretrained backbone with the head that a step trained, and a loader of the packed images for it.

    Args:
        head_of: name of the step that trained the head.
        batch_size: images per batch, or ``auto``.
        device: device to compute on.
    """
    return _on_device(load_head(artifact(head_of, "head.safetensors")), batch_size, device)


def fresh_classifier(dropout: float, batch_size: int | str, device: torch.device) -> tuple[Classifier, Loader]:
    """The pretrained backbone with a new head, and a loader of the packed images for it."""
    classes = len(open_packed(artifact("ingest", "")).classes)
    features = precomputed("activations.npy").shape[1]
    return _on_device(Head(features, classes, dropout), batch_size, device)


def _on_device(head: Head, batch_size: int | str, device: torch.device) -> tuple[Classifier, Loader]:
    backbone = load_backbone(artifact("precompute", "backbone.safetensors"))
    norm = Normalisation(backbone.mean, backbone.std)
    model = to_device(Classifier(backbone, head), device)
    packed = open_packed(artifact("ingest", ""))
    return model, Loader(packed, norm, device, images_per_batch(batch_size, packed))
