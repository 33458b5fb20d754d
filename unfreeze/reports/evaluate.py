"""The evaluation report: accuracy and calibration, the course of the training, and misclassified images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from unfreeze.data.packed import PackedImages
from unfreeze.evaluation.evaluating import Predictions
from unfreeze.evaluation.metrics import (
    accuracy_interval,
    confusion,
    gallery_places,
    most_confused,
    per_class,
    reliability,
)
from unfreeze.evaluation.model_choice import Candidate
from unfreeze.reports.html import MANY_ROWS, render
from unfreeze.reports.plots import (
    confusion_plot,
    histories_plot,
    learning_curves_plot,
    lr_find_plot,
    rates_plot,
    reliability_plot,
)

NAMES = {
    "baseline": "logistic regression",
    "train_head": "head on activations",
    "train_augmented": "head, augmented",
    "train_full": "whole network",
    "soup": "whole network, average of cycles",
}
GALLERIES = {
    "most_wrong": ("Most wrong", "Sure, and mistaken."),
    "most_uncertain": ("Most uncertain", "The first two classes are nearly equally probable."),
    "random_wrong": ("Wrong, at random", ""),
    "random_right": ("Right, at random", ""),
    "most_right": ("Most right", "Sure, and right."),
}
SHOWN, SHOWN_WEAKEST, SHOWN_BINS = 12, 10, 10


@dataclass(frozen=True)
class Course:
    """The course of the trainings.

    Attributes:
        curves: for each learning-rate finder its curve (`lr_find_plot`) and its picks.
        histories: for each training its history.csv.
        batches: batches.csv of the whole network's training.
        best_cycle: number (from 0) of the cycle of that training that was kept, if known.
    """

    curves: Mapping[str, tuple[pd.DataFrame, Mapping[str, float]]]
    histories: Mapping[str, pd.DataFrame]
    batches: pd.DataFrame
    best_cycle: int | None = None


def evaluate_report(
    packed: PackedImages,
    predictions: Mapping[str, Predictions],
    metrics: Mapping[str, float],
    candidates: Sequence[Candidate],
    chosen: str,
    reason: str,
    course: Course,
    seed: int,
) -> str:
    """The report as HTML.

    Args:
        packed: the images.
        predictions: of the chosen model, per split.
        metrics: ``<split>_accuracy`` and the others that the step evaluate writes.
        candidates: the models that were compared on the validation split.
        chosen: name of the selected model.
        reason: the reason for the selection, in a sentence.
        course: curves and tables of the trainings.
        seed: of the random galleries.
    """
    split = "test" if "test" in predictions else "valid"
    judged = predictions[split]
    numbers, accuracies = _accuracy(predictions, metrics)
    return render(
        "evaluate.html",
        split=split,
        classes=len(packed.classes),
        headline=_headline(split, len(judged.rows), metrics),
        numbers=numbers,
        accuracies=accuracies,
        reason=reason,
        candidates=[(NAMES[c.name], c.scores.accuracy, c.scores.loss) for c in candidates],
        chosen=[c.name for c in candidates].index(chosen),
        calibration=_calibration(packed, judged, split, metrics),
        confusion=_confusion(packed, judged),
        galleries=_galleries(packed, judged, seed),
        course=_course(course),
    )


def _accuracy(
    predictions: Mapping[str, Predictions], metrics: Mapping[str, float]
) -> tuple[list[tuple[str, str, str]], list[tuple[Any, ...]]]:
    """Key numbers, and table rows of all numbers, for each split and prediction method."""
    numbers, rows = [], []
    for split, found in reversed(list(predictions.items())):
        count = len(found.rows)
        for kind, title in (("tta_", "with TTA"), ("", "plain"), ("baseline_", "logistic regression")):
            accuracy, f1, loss = (metrics[f"{split}_{kind}{name}"] for name in ("accuracy", "macro_f1", "log_loss"))
            low, high = accuracy_interval(round(accuracy * count), count)
            between = f"{low:.1%} to {high:.1%}"
            numbers.append((f"{accuracy:.1%}", f"{split}, {title}", f"95 %: {between}"))
            rows.append((split, title, accuracy, between, f1, loss, count))
    return numbers, rows


def _headline(split: str, images: int, metrics: Mapping[str, float]) -> str:
    accuracy = metrics[f"{split}_tta_accuracy"]
    lead = 100 * (accuracy - metrics[f"{split}_baseline_accuracy"])
    points = f"{abs(lead):.1f} percentage points {'above' if lead >= 0 else 'below'}"
    text = f"{accuracy:.1%} of the {images:,} {split} images are right with TTA, {points} logistic regression."
    if split == "valid":
        text += (
            " There is no test split: the model was chosen on these very images, so expect a little less on new ones."
        )
    return text


def _calibration(packed: PackedImages, judged: Predictions, split: str, metrics: Mapping[str, float]) -> dict[str, Any]:
    before, after = metrics[f"{split}_uncalibrated_ece"], metrics[f"{split}_ece"]
    text = (
        f"The expected calibration error, the gap between confidence and accuracy, of the {split} images without TTA "
        f"is {after:.3f}; before calibration it was {before:.3f}. With this number of images a perfectly calibrated "
        f"model would have {metrics[f'{split}_ece_by_chance']:.3f} by chance. Logits are divided by the temperature "
        f"{metrics['temperature']:.2f}, which fits the validation images best; it is saved with the model, and "
        "every prediction uses it."
    )
    figure = reliability_plot(*reliability_tables(packed.labels[judged.rows], judged))
    return {"text": text, "figure": figure}


def reliability_tables(labels: NDArray[np.int64], judged: Predictions) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables for `reliability_plot`: of the plain predictions before and after calibration."""
    return reliability(judged.uncalibrated, labels, SHOWN_BINS), reliability(judged.plain, labels, SHOWN_BINS)


def _confusion(packed: PackedImages, judged: Predictions) -> dict[str, Any]:
    labels, predicted = packed.labels[judged.rows], judged.tta.argmax(1)
    matrix = confusion(labels, predicted, len(packed.classes))
    each = per_class(labels, predicted, packed.classes).itertuples(name=None)
    classes = [(name, precision, recall, f1, int(images)) for name, precision, recall, f1, images in each]
    weakest = sorted((row for row in classes if row[-1]), key=lambda row: row[3])[:SHOWN_WEAKEST]
    return {
        "figure": confusion_plot(matrix, packed.classes),
        "pairs": list(most_confused(matrix, packed.classes).head(15).itertuples(index=False, name=None)),
        "classes": classes,
        "weakest": weakest if len(classes) > MANY_ROWS else [],
    }


def _galleries(packed: PackedImages, judged: Predictions, seed: int) -> list[tuple[str, str, list[Any]]]:
    labels = packed.labels[judged.rows]
    galleries = []
    for kind, (title, remark) in GALLERIES.items():
        places = gallery_places(labels, judged.tta, kind, SHOWN, seed)
        images = [(packed[judged.rows[i]], _caption(packed, judged, int(i))) for i in places]
        galleries.append((title, remark, images))
    return galleries


def _caption(packed: PackedImages, judged: Predictions, place: int) -> tuple[str, str, str]:
    row, predicted = judged.rows[place], int(judged.tta[place].argmax())
    true = packed.classes[packed.labels[row]]
    sure = f"predicted {packed.classes[predicted]} {judged.tta[place, predicted]:.0%}"
    return true, sure, str(packed.table["path"][row]).rsplit("/", 1)[-1]


def _course(course: Course) -> dict[str, Any]:
    histories = {NAMES[name]: history for name, history in course.histories.items()}
    return {
        "histories": histories_plot(histories),
        "learning_curves": learning_curves_plot(course.histories["train_full"], course.best_cycle),
        "finders": [
            ("head" if name == "lr_find" else "whole network", lr_find_plot(curve, picks))
            for name, (curve, picks) in course.curves.items()
        ],
        "rates": rates_plot(course.batches),
    }
