"""The same recipe with the rates, cycles and epochs that were found, on train + valid; measured on test.

It replays head, augmented head and full training up to the one that `evaluate` chose. No validation split is left, so
only the test split can judge; where there is none, nobody can, and the log says so.
"""

import dataclasses
import json

import numpy as np

from pipeline.artifacts import artifact
from pipeline.inputs import fresh_classifier, precomputed
from pipeline.results import keep_confusion, write_predictions
from pipeline.step import Run, step
from pipeline.training_log import callbacks, keep
from unfreeze.device import seed_everything
from unfreeze.evaluation.baseline import baseline_probabilities, fit_baseline
from unfreeze.evaluation.evaluating import Predictions, evaluate_split
from unfreeze.models.weights import checksum, save_classifier
from unfreeze.settings.schema import Augment, Evaluate, Head, Train, TrainAugmented, TrainFull, TrainHead, Unfreeze
from unfreeze.training.phases import Activations, Images, fit_augmented, fit_full, fit_head


@step
def retrain(
    run: Run,
    seed: int,
    batch_size: int,
    head: Head,
    augment: Augment,
    train: Train,
    train_head: TrainHead,
    train_augmented: TrainAugmented,
    unfreeze: Unfreeze,
    train_full: TrainFull,
    evaluate: Evaluate,
) -> dict[str, float]:
    seed_everything(seed)
    model, loader = fresh_classifier(head.dropout, batch_size, run.device)
    packed = loader.packed
    activations = precomputed("activations.npy")
    rows = np.sort(np.concatenate([packed.rows("train"), packed.rows("valid")]))
    nothing = rows[:0]
    chosen = json.loads(artifact("evaluate", "chosen.json").read_text())["chosen"]
    rate = run.read_metrics("lr_find")["rate"]

    data = Activations(activations, packed.labels, rows, nothing, batch_size, seed, loader.device)
    history = fit_head(model.head, data, rate, train_head, train, callbacks(run, train_head.epochs, "head"))
    images = Images(loader, rows, nothing, augment, seed)
    if chosen != "train_head":
        history = fit_augmented(
            model, images, rate, train_augmented, train, callbacks(run, train_augmented.epochs, "augmented")
        )
    if chosen == "train_full":
        cycles = int(run.read_metrics("train_full")["best_cycle"])
        found = dataclasses.replace(train_full, cycles=cycles, until_overfitting=False)
        rate = run.read_metrics("unfreeze_lr_find")["rate"]
        history = fit_full(model, images, rate, found, unfreeze, train, callbacks(run, found.epochs, "full"))
    save_classifier(model, run.path("model.safetensors"), packed.classes, packed.image_size, augment)
    metrics = keep(run, history)

    predictions: dict[str, Predictions] = {}
    test = packed.rows("test")
    if len(test):
        baseline = fit_baseline(activations[rows], packed.labels[rows])
        probabilities = baseline_probabilities(baseline, activations[test], len(packed.classes))
        with run.predictions("test", checksum(model.state_dict())) as kept:
            predictions["test"], scores = evaluate_split(
                model, loader, test, probabilities, augment, evaluate.tta_views, kept
            )
        metrics |= {f"test_{name}": value for name, value in scores.items()}
        run.log(
            "test: accuracy %.4f, with TTA %.4f, logistic regression %.4f",
            scores["accuracy"], scores["tta_accuracy"], scores["baseline_accuracy"],
        )  # fmt: skip
    else:
        run.log(
            "There is no test split: nothing can judge the retrained model. Give test images, or set data.test where the "
            "source has no splits of its own."
        )
    write_predictions(run.path("predictions.csv"), packed, predictions)
    keep_confusion(run, packed, predictions)
    return metrics
