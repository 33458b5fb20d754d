"""What the step evaluate shows to people: the report and its pictures."""

from collections.abc import Mapping, Sequence

import pandas as pd

from tasks.files import artifact
from tasks.step import Run
from unfreeze.evaluate_report import Course, evaluate_report
from unfreeze.evaluating import Candidate, Predictions
from unfreeze.packed import PackedImages
from unfreeze.plotting import confusion_plot, learning_curves_plot, rates_plot, save_png


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
    """Write `report.html` and the pictures in it, from what was measured and what the steps before left."""
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
