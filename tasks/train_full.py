"""Train the whole network: SGDR with growing cycles and differential rates, until it overfits.

Warm restarts lead to wide minima, which generalize better. The weights at the end of every cycle are written to
`cycles/`, and the weights of the best cycle to `model.safetensors`.
"""

import shutil

from pipeline.cycles import keep_cycles
from pipeline.inputs import frozen_classifier
from pipeline.step import Run, step
from pipeline.training_log import callbacks, keep
from unfreeze.batches.loader import batches_per_epoch
from unfreeze.device import seed_everything
from unfreeze.models.weights import save_classifier
from unfreeze.settings.schema import Augment, Train, TrainFull, Unfreeze
from unfreeze.training.phases import Images, fit_full


@step
def train_full(
    run: Run,
    seed: int,
    batch_size: int | str,
    augment: Augment,
    train: Train,
    unfreeze: Unfreeze,
    train_full: TrainFull,
) -> dict[str, float]:
    seed_everything(seed)
    model, loader = frozen_classifier("train_augmented", batch_size, run.device)
    cycles = run.scratch / "cycles"  # not in artifacts/, which DVC clears before an interrupted step is restarted
    data = Images(loader, loader.packed.rows("train"), loader.packed.rows("valid"), augment, seed)
    rate = run.read_metrics("unfreeze_lr_find")["rate"]
    batches = batches_per_epoch(len(data.train), loader.batch_size)
    history = fit_full(
        model, data, rate, train_full, unfreeze, train,
        callbacks(run, train_full.epochs, batches, cycle=keep_cycles(cycles, model, loader.packed, augment)),
    )  # fmt: skip
    run.log("kept the weights of cycle %d", history.best_cycle + 1)
    packed = loader.packed
    save_classifier(model, run.path("model.safetensors"), packed.classes, packed.image_size, augment, packed.grey_range)
    shutil.copytree(cycles, run.path("cycles"), dirs_exist_ok=True)
    return keep(run, history)
