"""LR range test of the head on the precomputed activations: the loss at every rate, and a rate to train with."""

from collections.abc import Iterator

from pipeline.artifacts import artifact
from pipeline.find_rate import find_rate
from pipeline.inputs import precomputed
from pipeline.step import Run, step
from unfreeze.batches.loader import Batch, activation_batches, images_per_batch, shuffled
from unfreeze.data.packed import open_packed
from unfreeze.device import seed_everything
from unfreeze.models.classifier import Head
from unfreeze.models.freezing import decay_groups
from unfreeze.settings.schema import Head as HeadSettings
from unfreeze.settings.schema import LRFind, Train
from unfreeze.training.balance import make_loss, sampling_probabilities
from unfreeze.training.loop import make_optimizer
from unfreeze.training.phases import derive_seed


@step
def lr_find(
    run: Run, seed: int, batch_size: int | str, head: HeadSettings, train: Train, lr_find: LRFind
) -> dict[str, float]:
    seed_everything(seed)
    device = run.device
    packed = open_packed(artifact("ingest", ""))
    activations = precomputed("activations.npy")
    model = Head(activations.shape[1], len(packed.classes), head.dropout).to(device).train()
    optimizer = make_optimizer(decay_groups(model.parameters()), train)
    rows, size = packed.rows("train"), images_per_batch(batch_size, packed)
    labels = packed.labels[rows]
    probabilities = sampling_probabilities(train, labels)

    def batches(epoch: int, first: int) -> Iterator[Batch]:
        order = shuffled(rows, size, derive_seed(seed, "lr_find"), epoch, probabilities)
        return activation_batches(activations, packed.labels, order[first:], device)

    loss = make_loss(train, labels, len(packed.classes), device)
    return find_rate(run, model, optimizer, batches, lr_find, loss, len(packed.classes))
