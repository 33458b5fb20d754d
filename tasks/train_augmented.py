"""Train the head on augmented images through the frozen backbone; precomputed activations cannot be augmented.

Two or three short cycles, each annealing the rate that the finder picked.
"""

from pipeline.inputs import frozen_classifier
from pipeline.step import Run, step
from pipeline.training_log import callbacks, keep
from unfreeze.batches.loader import batches_per_epoch
from unfreeze.device import seed_everything
from unfreeze.models.weights import save_head
from unfreeze.settings.schema import Augment, Train, TrainAugmented
from unfreeze.training.phases import Images, fit_augmented


@step
def train_augmented(
    run: Run, seed: int, batch_size: int | str, augment: Augment, train: Train, train_augmented: TrainAugmented
) -> dict[str, float]:
    seed_everything(seed)
    model, loader = frozen_classifier("train_head", batch_size, run.device)
    data = Images(loader, loader.packed.rows("train"), loader.packed.rows("valid"), augment, seed)
    rate = run.read_metrics("lr_find")["rate"]
    batches = batches_per_epoch(len(data.train), loader.batch_size)
    history = fit_augmented(model, data, rate, train_augmented, train, callbacks(run, train_augmented.epochs, batches))
    save_head(model.head, run.path("head.safetensors"))
    return keep(run, history)
