"""Unfreeze the network, and search for the rate again: differential rates over the layer groups change the best one."""

from collections.abc import Iterator

from pipeline.find_rate import find_rate
from pipeline.inputs import frozen_classifier
from pipeline.step import Run, step
from unfreeze.batches.loader import Batch
from unfreeze.device import seed_everything
from unfreeze.settings.schema import Augment, Train, Unfreeze, UnfreezeLRFind
from unfreeze.training.loop import make_optimizer
from unfreeze.training.phases import Images, derive_seed, unfrozen


@step
def unfreeze_lr_find(
    run: Run,
    seed: int,
    batch_size: int | str,
    augment: Augment,
    train: Train,
    unfreeze: Unfreeze,
    unfreeze_lr_find: UnfreezeLRFind,
) -> dict[str, float]:
    seed_everything(seed)
    model, loader = frozen_classifier("train_augmented", batch_size, run.device)
    rows = loader.packed.rows("train")
    data = Images(loader, rows, rows[:0], augment, seed)

    def batches(epoch: int, first: int) -> Iterator[Batch]:
        return data.augmented(train, derive_seed(seed, "unfreeze_lr_find"), epoch, first)

    with unfrozen(model, loader, rows, unfreeze) as groups:
        optimizer = make_optimizer(groups, train)
        return find_rate(run, model, optimizer, batches, unfreeze_lr_find, data.loss(train), len(loader.packed.classes))
