"""How good the result is and where it goes wrong: predictions with and without TTA, confusion matrix, report.

Head, augmented head and full network are compared on the validation split, and the best is handed on: beyond chance, what a
user gets is never worse there than the frozen network. The test split is looked at last, with the model that was chosen.
"""

import numpy as np

from tasks.environment import artifact
from tasks.judging import keep_confusion, write_predictions
from tasks.materials import frozen_classifier
from tasks.reporting import write_report
from tasks.step import Run, step, write_json
from unfreeze.device import seed_everything, to_device
from unfreeze.evaluating import Candidate, Predictions, choose, evaluate_split, head_probabilities
from unfreeze.predicting import predict
from unfreeze.settings import Augment, Evaluate, Train
from unfreeze.weights import load_classifier, load_head, save_classifier


@step
def evaluate(run: Run, seed: int, augment: Augment, train: Train, evaluate: Evaluate) -> dict[str, float]:
    seed_everything(seed)
    model, loader = frozen_classifier("train_augmented", train.batch_size)
    packed = loader.packed
    valid = packed.rows("valid")
    activations = np.load(artifact("precompute", "activations.npy"), mmap_mode="r")
    baseline = np.load(artifact("precompute", "baseline.npy"))

    candidates = [
        Candidate(
            name,
            head_probabilities(load_head(artifact(name, "head.safetensors")), activations[valid]),
            packed.labels[valid],
        )
        for name in ("train_head", "train_augmented")
    ]
    full, _ = load_classifier(artifact("train_full", "model.safetensors"))
    to_device(full, loader.device)
    candidates.append(Candidate("train_full", predict(full, loader.plain(valid)), packed.labels[valid]))
    best, reason = choose(candidates)
    run.log("%s", reason)
    if best.name == "train_full":
        model = full
    else:
        model.head = load_head(artifact(best.name, "head.safetensors")).to(loader.device)

    metrics: dict[str, float] = {}
    predictions: dict[str, Predictions] = {}
    for split in ("valid", "test"):
        rows = packed.rows(split)
        if len(rows):
            predictions[split], scores = evaluate_split(
                model, loader, rows, baseline[rows], augment.flip, evaluate.tta_views
            )
            metrics |= {f"{split}_{name}": value for name, value in scores.items()}
            run.log(
                "%s: accuracy %.4f, with TTA %.4f, logistic regression %.4f",
                split, scores["accuracy"], scores["tta_accuracy"], scores["baseline_accuracy"],
            )  # fmt: skip
    metrics |= {f"{candidate.name}_accuracy": candidate.scores.accuracy for candidate in candidates}

    save_classifier(model, run.path("model.safetensors"), packed.classes, packed.image_size, augment.flip)
    write_json(run.path("chosen.json"), {"chosen": best.name, "reason": reason})
    write_predictions(run.path("predictions.csv"), packed, predictions)
    keep_confusion(run, packed, predictions)
    write_report(run, packed, predictions, metrics, candidates, best.name, reason, seed)
    run.log("report: %s", run.path("report.html"))
    return metrics


if __name__ == "__main__":
    evaluate.main()
