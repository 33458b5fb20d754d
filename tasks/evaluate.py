"""How good the result is and where it goes wrong: predictions with and without TTA, confusion matrix, report.

Head, augmented head and full network are compared on the validation split, each at its best, with TTA, and the best is
handed on: beyond chance, what a user gets is never worse there than the frozen network. The test split is looked at last,
with the model that was chosen.
"""

from tasks.files import artifact, write_json
from tasks.judging import keep_confusion, write_predictions
from tasks.materials import frozen_classifier, precomputed
from tasks.reporting import write_report
from tasks.step import Run, step
from unfreeze.device import seed_everything, to_device
from unfreeze.evaluating import Candidate, Predictions, choose, evaluate_split
from unfreeze.models import Classifier
from unfreeze.settings import Augment, Evaluate
from unfreeze.weights import load_classifier, load_head, save_classifier


@step
def evaluate(run: Run, seed: int, batch_size: int, augment: Augment, evaluate: Evaluate) -> dict[str, float]:
    seed_everything(seed)
    model, loader = frozen_classifier("train_augmented", batch_size)
    packed = loader.packed
    valid = packed.rows("valid")
    baseline = precomputed("baseline.npy")

    models = {
        name: Classifier(model.backbone, load_head(artifact(name, "head.safetensors")).to(loader.device))
        for name in ("train_head", "train_augmented")
    }
    full, _ = load_classifier(artifact("train_full", "model.safetensors"))
    models["train_full"] = to_device(full, loader.device)

    def judge(name: str, split: str) -> tuple[Predictions, dict[str, float]]:
        rows = packed.rows(split)
        with run.resumable(f"{name}-{split}") as kept:
            return evaluate_split(models[name], loader, rows, baseline[rows], augment, evaluate.tta_views, kept)

    judged = {name: judge(name, "valid") for name in models}
    candidates = [Candidate(name, found.tta, packed.labels[valid]) for name, (found, _) in judged.items()]
    best, reason = choose(candidates)
    run.log("%s", reason)

    model = models[best.name]
    splits = {"valid": judged[best.name]}
    if len(packed.rows("test")):
        splits["test"] = judge(best.name, "test")
    metrics = {f"{split}_{name}": value for split, (_, scores) in splits.items() for name, value in scores.items()}
    predictions = {split: found for split, (found, _) in splits.items()}
    for split, (_, scores) in splits.items():
        run.log(
            "%s: accuracy %.4f, with TTA %.4f, logistic regression %.4f",
            split, scores["accuracy"], scores["tta_accuracy"], scores["baseline_accuracy"],
        )  # fmt: skip
    for name, (_, scores) in judged.items():
        metrics |= {f"{name}_{kind}": scores[kind] for kind in ("accuracy", "tta_accuracy", "tta_log_loss")}

    save_classifier(model, run.path("model.safetensors"), packed.classes, packed.image_size, augment)
    write_json(run.path("chosen.json"), {"chosen": best.name, "reason": reason})
    write_predictions(run.path("predictions.csv"), packed, predictions)
    keep_confusion(run, packed, predictions)
    write_report(run, packed, predictions, metrics, candidates, best.name, reason, seed)
    run.log("report: %s", run.path("report.html"))
    return metrics
