"""Activations of the frozen backbone for every image, without augmentation.

The head then trains in seconds. The backbone's weights are kept beside the activations: later steps start from exactly
these, whatever becomes of the hub or file they came from. scikit-learn's logistic regression on the activations is the
honest baseline that stands beside every accuracy of the recipe.
"""

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
    shape = (len(packed), network.num_features)
    kept = np.lib.format.open_memmap(run.path("activations.npy"), "w+", np.float32, shape)
    activations = backbone_activations(to_device(network, device), loader, kept)
    kept.flush()
    run.log("%d images through %s: %d activations each", len(packed), backbone.name, activations.shape[1])

    rows = packed.rows("train")
    regression = fit_baseline(activations[rows], packed.labels[rows])
    baseline = baseline_probabilities(regression, activations, len(packed.classes))
    accuracy = score(baseline[packed.rows("valid")], packed.labels[packed.rows("valid")]).accuracy
    run.log("logistic regression on the activations: %.3f of the validation images right", accuracy)

    np.save(run.path("baseline.npy"), baseline)
    save_backbone(network.cpu(), run.path("backbone.safetensors"))
    return {"images": len(packed), "features": activations.shape[1], "valid_baseline_accuracy": accuracy}


if __name__ == "__main__":
    precompute.main()
