"""Unfreeze, then look for the rate again: with differential rates over the layer groups the best one has moved."""

from collections.abc import Iterator

from tasks.finding import find_rate
from tasks.materials import frozen_classifier
from tasks.step import Run, step
from unfreeze.batches import Batch
from unfreeze.device import seed_everything
from unfreeze.recipe import derive_seed, unfrozen
from unfreeze.settings import Augment, Train, Unfreeze, UnfreezeLRFind
from unfreeze.training import make_optimizer


@step
def unfreeze_lr_find(
    run: Run,
    seed: int,
    batch_size: int,
    augment: Augment,
    train: Train,
    unfreeze: Unfreeze,
    unfreeze_lr_find: UnfreezeLRFind,
) -> dict[str, float]:
    seed_everything(seed)
    model, loader = frozen_classifier("train_augmented", batch_size)
    rows = loader.packed.rows("train")

    def batches(epoch: int, first: int) -> Iterator[Batch]:
        return loader.augmented(rows, augment, derive_seed(seed, "unfreeze_lr_find"), epoch, first)

    with unfrozen(model, loader, rows, unfreeze) as groups:
        optimizer = make_optimizer(groups, train)
        return find_rate(run, model, optimizer, batches, unfreeze_lr_find)
