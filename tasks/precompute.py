"""Activations of the frozen backbone for every image, without augmentation.

The head then trains in seconds. The backbone's weights are stored beside the activations, so that later steps do not
depend on the hub or file that they came from. scikit-learn's logistic regression on the activations is the baseline
that every accuracy of the recipe is compared with.
"""

import io

import numpy as np

from pipeline.artifacts import artifact
from pipeline.step import Run, step
from unfreeze.batches.loader import Loader, Normalisation, images_per_batch
from unfreeze.data.packed import open_packed
from unfreeze.device import seed_everything, to_device
from unfreeze.evaluation.baseline import baseline_head, baseline_probabilities, fit_baseline
from unfreeze.evaluation.metrics import score
from unfreeze.evaluation.predicting import backbone_activations
from unfreeze.models.backbones import create_backbone
from unfreeze.models.weights import checksum, save_backbone, save_head
from unfreeze.settings.schema import Backbone


@step
def precompute(run: Run, seed: int, batch_size: int | str, backbone: Backbone) -> dict[str, float]:
    seed_everything(seed)
    device = run.device
    packed = open_packed(artifact("ingest", ""))
    network = create_backbone(backbone.name, backbone.weights, packed.image_size)
    loader = Loader(packed, Normalisation(network.mean, network.std), device, images_per_batch(batch_size, packed))
    weights = checksum(network.state_dict())
    to_device(network, device)
    # Written batch by batch: for a hundred thousand images the activations are half a gigabyte.
    with run.predictions("activations.npy", weights) as file:
        if not file.notes:
            file.append(_header(len(packed), network.num_features), 0)
        elif done := sum(file.notes):
            run.log("%d of %d images were done before an interruption", done, len(packed))
        for batch in backbone_activations(network, loader, sum(file.notes)):
            file.append(batch.tobytes(), len(batch))
        file.keep()
        activations = np.load(file.path, mmap_mode="r")
        run.log("%d images through %s: %d activations each", len(packed), backbone.name, activations.shape[1])
        run.log("batches of %d images", loader.batch_size)

        rows = packed.rows("train")
        regression = fit_baseline(activations[rows], packed.labels[rows])
        baseline = baseline_probabilities(regression, activations, len(packed.classes))
        accuracy = score(baseline[packed.rows("valid")], packed.labels[packed.rows("valid")]).accuracy
        run.log("logistic regression on the activations: %.3f of the validation images right", accuracy)

        np.save(run.path("baseline.npy"), baseline.astype(np.float32))
        head = baseline_head(regression, activations.shape[1], len(packed.classes))
        save_head(head, run.path("baseline.safetensors"))
        save_backbone(network.cpu(), run.path("backbone.safetensors"))
        file.put(run.path("activations.npy"))
    return {
        "images": len(packed),
        "features": activations.shape[1],
        "batch_size": loader.batch_size,
        "valid_baseline_accuracy": accuracy,
    }


def _header(images: int, features: int) -> bytes:
    """Header of a ``.npy`` file, to which rows are then appended."""
    header = io.BytesIO()
    array = np.empty((0, features), np.float32)
    described = np.lib.format.header_data_from_array_1_0(array) | {"shape": (images, features)}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()
