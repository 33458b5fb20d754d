"""Train the whole network: SGDR with growing cycles and differential rates, until it overfits.

Warm restarts lead to wide valleys, which generalize. The weights at the end of every cycle are kept; the best cycle's
are what the step hands on.
"""

from tasks.fitting import keep, listener
from tasks.materials import frozen_classifier
from tasks.step import Run, step
from unfreeze.device import seed_everything
from unfreeze.recipe import fit_full
from unfreeze.settings import Augment, Train, TrainFull, Unfreeze
from unfreeze.weights import save_classifier


@step
def train_full(
    run: Run, seed: int, augment: Augment, train: Train, unfreeze: Unfreeze, train_full: TrainFull
) -> dict[str, float]:
    seed_everything(seed)
    model, loader = frozen_classifier("train_augmented", train.batch_size)
    run.path("cycles").mkdir(exist_ok=True)

    def save(name: str) -> None:
        save_classifier(model, run.path(name), loader.packed.classes, loader.packed.image_size, augment.flip)

    history = fit_full(
        model,
        loader,
        loader.packed.rows("train"),
        loader.packed.rows("valid"),
        run.read_metrics("unfreeze_lr_find")["rate"],
        train_full,
        unfreeze,
        augment,
        train,
        seed,
        listener(run, train_full.epochs, cycle=lambda number: save(f"cycles/{number + 1}.safetensors")),
    )
    run.log("kept the weights of cycle %d", history.best_cycle + 1)
    save("model.safetensors")
    return keep(run, history)


if __name__ == "__main__":
    train_full.main()
