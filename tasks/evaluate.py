"""Evaluate the models and their errors: predictions with and without TTA, confusion matrix, report.

Logistic regression, head, augmented head, full network and the average of its cycles' weights (a model soup) are
compared on the validation split, with TTA and calibrated probabilities. Of the models that are not significantly less
accurate than the most accurate one, the model with the lowest log loss is selected. The test split is used last, for
the selected model only.
"""

import copy
from collections.abc import Mapping, Sequence

import pandas as pd

from pipeline.artifacts import artifact, write_json
from pipeline.cycles import average_cycles
from pipeline.inputs import frozen_classifier, precomputed
from pipeline.results import keep_confusion, write_predictions
from pipeline.step import Run, step
from unfreeze.data.packed import PackedImages
from unfreeze.device import seed_everything, to_device
from unfreeze.evaluation.evaluating import Evaluation, Predictions, evaluate_split
from unfreeze.evaluation.model_choice import Candidate, choose
from unfreeze.evaluation.predicting import predict_tta, predict_tta_of_heads
from unfreeze.evaluation.soup import greedy_soup
from unfreeze.models.classifier import Classifier
from unfreeze.models.weights import load_classifier, load_head, save_classifier
from unfreeze.reports.evaluate import Course, evaluate_report, reliability_tables
from unfreeze.reports.plots import confusion_plot, learning_curves_plot, rates_plot, reliability_plot, save_png
from unfreeze.settings.schema import Augment, Evaluate


@step
def evaluate(run: Run, seed: int, batch_size: int | str, augment: Augment, evaluate: Evaluate) -> dict[str, float]:
    seed_everything(seed)
    model, loader = frozen_classifier("train_augmented", batch_size, run.device)
    packed = loader.packed
    valid = packed.rows("valid")
    baseline = precomputed("baseline.npy")

    files = {
        "baseline": artifact("precompute", "baseline.safetensors"),
        "train_head": artifact("train_head", "head.safetensors"),
        "train_augmented": artifact("train_augmented", "head.safetensors"),
    }
    heads = {name: load_head(path).to(loader.device) for name, path in files.items()}
    models = {name: Classifier(model.backbone, head) for name, head in heads.items()}
    models["train_full"] = to_device(load_classifier(artifact("train_full", "model.safetensors"))[0], loader.device)

    def judge(model: Classifier, name: str, split: str, temperature: float | None = None) -> Evaluation:
        rows = packed.rows(split)
        with run.predictions(f"{name}-{split}") as kept:
            found = predict_tta(model, loader, rows, augment, evaluate.tta_views, kept)
            return evaluate_split(found, rows, packed, baseline[rows], temperature)

    def soup(cycles: Sequence[int]) -> Classifier:
        averaged = copy.deepcopy(models["train_full"])
        averaged.load_state_dict(average_cycles(artifact("train_full", "cycles"), cycles))
        return averaged

    def judge_soup(cycles: Sequence[int]) -> Evaluation:
        return judge(soup(cycles), f"soup-{'-'.join(map(str, cycles))}", "valid")

    with run.predictions("heads-valid") as kept:
        of_heads = predict_tta_of_heads(
            model.backbone, list(heads.values()), loader, valid, augment, evaluate.tta_views, kept
        )
        judged = {
            name: evaluate_split(found, valid, packed, baseline[valid])
            for name, found in zip(heads, of_heads, strict=True)
        }
    judged["train_full"] = judge(models["train_full"], "train_full", "valid")
    alone = judged["train_full"].metrics["tta_log_loss"]
    cycles = greedy_soup(cycle_losses(), lambda those: judge_soup(those).metrics["tta_log_loss"], alone)
    if len(cycles) > 1:
        models["soup"], judged["soup"] = soup(cycles), judge_soup(cycles)
    candidates = [Candidate(name, found.predictions.tta, packed.labels[valid]) for name, found in judged.items()]
    best, reason = choose(candidates)
    run.log("%s", reason)

    model, temperature = models[best.name], judged[best.name].temperature
    splits = {"valid": judged[best.name]}
    if len(packed.rows("test")):
        splits["test"] = judge(model, best.name, "test", temperature)
    metrics = {f"{split}_{name}": value for split, found in splits.items() for name, value in found.metrics.items()}
    metrics["temperature"] = temperature
    predictions = {split: found.predictions for split, found in splits.items()}
    for split, found in splits.items():
        run.log(
            "%s: accuracy %.4f, with TTA %.4f, logistic regression %.4f",
            split, *(found.metrics[name] for name in ("accuracy", "tta_accuracy", "baseline_accuracy")),
        )  # fmt: skip
    for name, found in judged.items():
        metrics |= {f"{name}_{kind}": found.metrics[kind] for kind in ("accuracy", "tta_accuracy", "tta_log_loss")}

    model.temperature = temperature
    weights = run.path("model.safetensors")
    save_classifier(model, weights, packed.classes, packed.image_size, augment, packed.grey_range, evaluate.tta_views)
    write_json(
        run.path("chosen.json"), {"chosen": best.name, "reason": reason, "soup": cycles if best.name == "soup" else []}
    )
    write_predictions(run.path("predictions.csv"), packed, predictions)
    keep_confusion(run, packed, predictions)
    write_report(run, packed, predictions, metrics, candidates, best.name, reason, seed)
    run.log("report: %s", run.path("report.html"))
    return metrics


def cycle_losses() -> dict[int, float]:
    """The calibrated validation loss at the end of each of `train_full`'s cycles, by the cycle's number from 1."""
    ends = pd.read_csv(artifact("train_full", "history.csv")).groupby("cycle")["valid_calibrated_loss"].last()
    return dict(zip((ends.index.to_numpy() + 1).tolist(), ends.tolist(), strict=True))


def write_report(
    run: Run,
    packed: PackedImages,
    predictions: Mapping[str, Predictions],
    metrics: Mapping[str, float],
    candidates: Sequence[Candidate],
    chosen: str,
    reason: str,
    seed: int,
) -> None:
    """Write `report.html` and its plots, from the measured predictions and the outputs of earlier steps."""
    trainings = ("train_head", "train_augmented", "train_full")
    course = Course(
        {
            name: (pd.read_csv(artifact(name, "curve.csv")), run.read_metrics(name))
            for name in ("lr_find", "unfreeze_lr_find")
        },
        {name: pd.read_csv(artifact(name, "history.csv")) for name in trainings},
        pd.read_csv(artifact("train_full", "batches.csv")),
        int(run.read_metrics("train_full")["best_cycle"]) - 1,
    )
    text = evaluate_report(packed, predictions, metrics, candidates, chosen, reason, course, seed)
    run.path("report.html").write_text(text, encoding="utf-8")
    matrix = pd.read_csv(run.path("confusion_matrix.csv"), index_col=0).to_numpy()
    save_png(confusion_plot(matrix, packed.classes), run.path("confusion_matrix.png"))
    save_png(learning_curves_plot(course.histories["train_full"], course.best_cycle), run.path("learning_curves.png"))
    save_png(rates_plot(course.batches), run.path("rates.png"))
    judged = predictions.get("test", predictions["valid"])
    save_png(reliability_plot(*reliability_tables(packed.labels[judged.rows], judged)), run.path("reliability.png"))
