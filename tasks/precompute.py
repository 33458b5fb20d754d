"""Activations of the frozen backbone for every image, without augmentation.

The head then trains in seconds. The backbone's weights are kept beside the activations: later steps start from exactly
these, whatever becomes of the hub or file they came from. scikit-learn's logistic regression on the activations is the
honest baseline that stands beside every accuracy of the recipe.
"""

import os
from pathlib import Path

import numpy as np

from tasks.environment import artifact
from tasks.step import Run, step
from unfreeze.backbones import create_backbone
from unfreeze.baseline import baseline_probabilities, fit_baseline
from unfreeze.batches import Loader, Normalisation
from unfreeze.device import best_device, seed_everything, to_device
from unfreeze.packed import open_packed
from unfreeze.predicting import backbone_activations, score
from unfreeze.settings import Backbone, Train
from unfreeze.weights import save_backbone


@step
def precompute(run: Run, seed: int, backbone: Backbone, train: Train) -> dict[str, float]:
    seed_everything(seed)
    device = best_device()
    packed = open_packed(artifact("ingest", ""))
    network = create_backbone(backbone.name, backbone.weights, packed.image_size)
    loader = Loader(packed, Normalisation(network.mean, network.std), device, train.batch_size)
    # Written as they come: for a hundred thousand images they are half a gigabyte.
    kept = _array(run.path("activations.npy"), (len(packed), network.num_features))
    activations = backbone_activations(to_device(network, device), loader, kept)
    kept.flush()
    run.log("%d images through %s: %d activations each", len(packed), backbone.name, activations.shape[1])

    rows = packed.rows("train")
    regression = fit_baseline(activations[rows], packed.labels[rows])
    baseline = baseline_probabilities(regression, activations, len(packed.classes))
    accuracy = score(baseline[packed.rows("valid")], packed.labels[packed.rows("valid")]).accuracy
    run.log("logistic regression on the activations: %.3f of the validation images right", accuracy)

    _array(run.path("baseline.npy"), baseline.shape)[:] = baseline
    save_backbone(network.cpu(), run.path("backbone.safetensors"))
    return {"images": len(packed), "features": activations.shape[1], "valid_baseline_accuracy": accuracy}


def _array(path: Path, shape: tuple[int, int]) -> np.memmap:
    """A float32 array in a file, to be written. Its space is taken at once: a disk that is full only when memory is
    written back to it ends the process without a word (SIGBUS)."""
    array = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


if __name__ == "__main__":
    precompute.main()
