"""LR range test of the head on the precomputed activations: the loss at every rate, and a rate to train with."""

from collections.abc import Iterator

from tasks.files import artifact
from tasks.finding import find_rate
from tasks.materials import precomputed
from tasks.step import Run, step
from unfreeze.batches import Batch, activation_batches, shuffled
from unfreeze.device import best_device, seed_everything
from unfreeze.models import Head, decay_groups
from unfreeze.packed import open_packed
from unfreeze.recipe import derive_seed
from unfreeze.settings import Head as HeadSettings
from unfreeze.settings import LRFind, Train
from unfreeze.training import make_optimizer


@step
def lr_find(
    run: Run, seed: int, batch_size: int, head: HeadSettings, train: Train, lr_find: LRFind
) -> dict[str, float]:
    seed_everything(seed)
    device = best_device()
    packed = open_packed(artifact("ingest", ""))
    activations = precomputed("activations.npy")
    model = Head(activations.shape[1], len(packed.classes), head.dropout).to(device).train()
    optimizer = make_optimizer(decay_groups(model.parameters()), train)
    rows = packed.rows("train")

    def batches(epoch: int, first: int) -> Iterator[Batch]:
        order = shuffled(rows, batch_size, derive_seed(seed, "lr_find"), epoch)
        return activation_batches(activations, packed.labels, order[first:], device)

    return find_rate(run, model, optimizer, batches, lr_find)
