"""Train the head on augmented images through the frozen backbone: with precomputed activations nothing can be augmented.

Two or three short cycles, each annealing the rate that the finder picked.
"""

from pipeline.inputs import frozen_classifier
from pipeline.step import Run, step
from pipeline.training_log import keep, listener
from unfreeze.device import seed_everything
from unfreeze.models.weights import save_head
from unfreeze.settings.schema import Augment, Train, TrainAugmented
from unfreeze.training.phases import fit_augmented


@step
def train_augmented(
    run: Run, seed: int, batch_size: int, augment: Augment, train: Train, train_augmented: TrainAugmented
) -> dict[str, float]:
    seed_everything(seed)
    model, loader = frozen_classifier("train_head", batch_size)
    history = fit_augmented(
        model,
        loader,
        loader.packed.rows("train"),
        loader.packed.rows("valid"),
        run.read_metrics("lr_find")["rate"],
        train_augmented,
        augment,
        train,
        seed,
        listener(run, train_augmented.epochs),
        run.checkpoint(),
    )
    save_head(model.head, run.path("head.safetensors"))
    return keep(run, history)
