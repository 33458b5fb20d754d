"""Train on train + valid, with the rates, cycles and epochs found before, and evaluate on the test split.

If `evaluate` has selected the logistic regression, it is fitted again. Otherwise the trainings up to the selected
model are repeated; for the model soup, the weights of the same cycles are then averaged. The temperature is kept. No
validation split is left, so the model is evaluated on the test split only; if there is none, the log says so.
"""

import dataclasses
import json

import numpy as np

from pipeline.artifacts import artifact
from pipeline.cycles import average_cycles, keep_cycles
from pipeline.inputs import fresh_classifier, precomputed
from pipeline.results import keep_confusion, write_predictions
from pipeline.step import Run, step
from pipeline.training_log import callbacks, keep
from unfreeze.batches.loader import batches_per_epoch
from unfreeze.device import seed_everything, to_device
from unfreeze.evaluation.baseline import baseline_head, baseline_probabilities, fit_baseline
from unfreeze.evaluation.evaluating import Predictions, evaluate_split
from unfreeze.evaluation.predicting import predict_tta
from unfreeze.models.weights import checksum, save_classifier
from unfreeze.settings.schema import Augment, Evaluate, Head, Train, TrainAugmented, TrainFull, TrainHead, Unfreeze
from unfreeze.training.history import History
from unfreeze.training.phases import Activations, Images, fit_augmented, fit_full, fit_head


@step
def retrain(
    run: Run,
    seed: int,
    batch_size: int | str,
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
    batches = batches_per_epoch(len(rows), loader.batch_size)
    choice = json.loads(artifact("evaluate", "chosen.json").read_text())
    chosen = choice["chosen"]
    rate = run.read_metrics("lr_find")["rate"]

    baseline = fit_baseline(activations[rows], packed.labels[rows])
    if chosen == "baseline":
        model.head, history = baseline_head(baseline, activations.shape[1], len(packed.classes)), History()
        to_device(model, loader.device)
    else:
        data = Activations(activations, packed.labels, rows, nothing, loader.batch_size, seed, loader.device)
        history = fit_head(
            model.head, data, rate, train_head, train, callbacks(run, train_head.epochs, batches, "head")
        )
    images = Images(loader, rows, nothing, augment, seed)
    if chosen in ("train_augmented", "train_full", "soup"):
        history = fit_augmented(
            model, images, rate, train_augmented, train, callbacks(run, train_augmented.epochs, batches, "augmented")
        )
    if chosen in ("train_full", "soup"):
        cycles = choice["soup"] if chosen == "soup" else [int(run.read_metrics("train_full")["best_cycle"])]
        found = dataclasses.replace(train_full, cycles=max(cycles), until_overfitting=False)
        rate = run.read_metrics("unfreeze_lr_find")["rate"]
        save = keep_cycles(run.scratch / "cycles", model, packed, augment)
        history = fit_full(
            model, images, rate, found, unfreeze, train, callbacks(run, found.epochs, batches, "full", save)
        )
        if chosen == "soup":
            model.load_state_dict(average_cycles(run.scratch / "cycles", cycles))
    metrics, temperature = keep(run, history), run.read_metrics("evaluate")["temperature"]

    predictions: dict[str, Predictions] = {}
    test = packed.rows("test")
    if len(test):
        probabilities = baseline_probabilities(baseline, activations[test], len(packed.classes))
        with run.predictions("test", checksum(model.state_dict())) as kept:
            views = predict_tta(model, loader, test, augment, evaluate.tta_views, kept)
            judged = evaluate_split(views, test, packed, probabilities, temperature)
        predictions["test"] = judged.predictions
        metrics |= {f"test_{name}": value for name, value in judged.metrics.items()}
        run.log(
            "test: accuracy %.4f, with TTA %.4f, logistic regression %.4f",
            *(judged.metrics[name] for name in ("accuracy", "tta_accuracy", "baseline_accuracy")),
        )
    else:
        run.log(
            "There is no test split: the retrained model cannot be evaluated. Add test images, or set data.test if the "
            "source has no splits of its own."
        )
    model.temperature = temperature
    weights = run.path("model.safetensors")
    save_classifier(model, weights, packed.classes, packed.image_size, augment, packed.grey_range, evaluate.tta_views)
    write_predictions(run.path("predictions.csv"), packed, predictions)
    keep_confusion(run, packed, predictions)
    return metrics
