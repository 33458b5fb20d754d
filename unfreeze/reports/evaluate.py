"""The evaluation report: accuracy and calibration, the course of the training, and misclassified images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
from unfreeze.reports.html import Section, cards, folded, gallery, heading, page, paragraph, plot, table
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
SHOWN, SHOWN_ROWS, SHOWN_BINS = 12, 20, 10


@dataclass(frozen=True)
class Course:
    """How training went.

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
    """The page.

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
    sections = [
        Section("Accuracy", _accuracy(predictions, metrics)),
        Section("Which model", _which(candidates, chosen, reason, metrics)),
        Section("Calibration", _calibration(packed, judged, split, metrics)),
        Section("Confusion matrix", _confusion(packed, judged, split)),
        Section("Where it goes wrong, and right", _galleries(packed, judged, split, seed)),
        Section("How it was trained", _course(course)),
    ]
    return page("The classifier", f"{len(packed.classes)} classes, judged on the {split} images with TTA", sections)


def _accuracy(predictions: Mapping[str, Predictions], metrics: Mapping[str, float]) -> str:
    items, rows = [], []
    for split, found in reversed(list(predictions.items())):
        count = len(found.rows)
        for kind, title in (("tta_", "with TTA"), ("", "plain"), ("baseline_", "logistic regression")):
            accuracy = metrics[f"{split}_{kind}accuracy"]
            low, high = accuracy_interval(round(accuracy * count), count)
            between = f"{low:.1%} to {high:.1%}"
            items.append((f"{accuracy:.1%}", f"{split}, {title}", f"95 %: {between}"))
            rows.append(
                (split, title, accuracy, between, metrics[f"{split}_{kind}macro_f1"], metrics[f"{split}_{kind}log_loss"], count)
            )  # fmt: skip
    about = paragraph(
        "TTA averages the probabilities of several views of an image. Logistic regression is scikit-learn's, on the "
        "frozen backbone's activations: the honest baseline.", "soft"
    )  # fmt: skip
    return (
        _headline(predictions, metrics)
        + cards(items)
        + about
        + table(["split", "", "accuracy", "95 % interval", "macro F1", "log loss", "images"], rows)
    )


def _headline(predictions: Mapping[str, Predictions], metrics: Mapping[str, float]) -> str:
    split = "test" if "test" in predictions else "valid"
    accuracy = metrics[f"{split}_tta_accuracy"]
    lead = 100 * (accuracy - metrics[f"{split}_baseline_accuracy"])
    points = f"{abs(lead):.1f} percentage points {'above' if lead >= 0 else 'below'}"
    text = f"{accuracy:.1%} of the {len(predictions[split].rows):,} {split} images are right with TTA, {points} logistic regression."
    if split == "valid":
        text += (
            " There is no test split: the model was chosen on these very images, so expect a little less on new ones."
        )
    return paragraph(text)


def _which(candidates: Sequence[Candidate], chosen: str, reason: str, metrics: Mapping[str, float]) -> str:
    rows = [(NAMES[c.name], c.scores.accuracy, c.scores.loss) for c in candidates]
    place = [c.name for c in candidates].index(chosen)
    return paragraph(reason) + table(["model, with TTA", "validation accuracy", "log loss"], rows, place)


def _calibration(packed: PackedImages, judged: Predictions, split: str, metrics: Mapping[str, float]) -> str:
    before, after = metrics[f"{split}_uncalibrated_ece"], metrics[f"{split}_ece"]
    text = (
        f"The expected calibration error, the gap between confidence and accuracy, of the {split} images without TTA "
        f"is {after:.3f}; before calibration it was {before:.3f}. With as many images a perfectly calibrated model "
        f"would have {metrics[f'{split}_ece_by_chance']:.3f} by chance. Logits are divided by the temperature "
        f"{metrics['temperature']:.2f}, which fits the validation images best; the model's file has it, and every "
        "prediction uses it."
    )
    return paragraph(text) + plot(
        reliability_plot(*reliability_tables(packed.labels[judged.rows], judged)),
        "accuracy against confidence, before and after calibration",
    )


def reliability_tables(labels: NDArray[np.int64], judged: Predictions) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What `reliability_plot` shows: of the plain predictions before and after calibration."""
    return reliability(judged.uncalibrated, labels, SHOWN_BINS), reliability(judged.plain, labels, SHOWN_BINS)


def _confusion(packed: PackedImages, judged: Predictions, split: str) -> str:
    labels, predicted = packed.labels[judged.rows], judged.tta.argmax(1)
    matrix = confusion(labels, predicted, len(packed.classes))
    text = plot(confusion_plot(matrix, packed.classes), f"confusion matrix of the {split} images")
    confused = most_confused(matrix, packed.classes).head(15)
    if len(confused):
        rows = list(confused.itertuples(index=False, name=None))
        text += heading("Most confused") + table(["true", "predicted", "images"], rows)
    each = per_class(labels, predicted, packed.classes)
    rows = [(name, *row) for name, row in zip(packed.classes, _rows(each), strict=True)]
    header = ["class", "precision", "recall", "F1", "images"]
    if len(rows) <= SHOWN_ROWS:
        return text + heading("Each class") + table(header, rows)
    weakest = sorted((row for row in rows if row[-1]), key=lambda row: row[3])[: SHOWN_ROWS // 2]
    text += heading(f"The {len(weakest)} classes with the lowest F1") + table(header, weakest)
    return text + folded(f"All {len(rows)} classes", table(header, rows))


def _rows(frame: pd.DataFrame) -> list[tuple[float, float, float, int]]:
    return [(p, r, f, int(n)) for p, r, f, n in frame.itertuples(index=False, name=None)]


def _galleries(packed: PackedImages, judged: Predictions, split: str, seed: int) -> str:
    labels = packed.labels[judged.rows]
    text = paragraph(
        f"Examples of the {split} images; below each its true class, and the predicted class with its probability.",
        "soft",
    )
    for kind, (title, remark) in GALLERIES.items():
        places = gallery_places(labels, judged.tta, kind, SHOWN, seed)
        text += heading(title) + (paragraph(remark, "soft") if remark else "")
        text += (
            gallery((packed[judged.rows[i]], _caption(packed, judged, int(i))) for i in places)
            if len(places)
            else paragraph("There are none.", "note fine")
        )
    return text


def _caption(packed: PackedImages, judged: Predictions, place: int) -> tuple[str, str, str]:
    row, predicted = judged.rows[place], int(judged.tta[place].argmax())
    true = packed.classes[packed.labels[row]]
    sure = f"predicted {packed.classes[predicted]} {judged.tta[place, predicted]:.0%}"
    return true, sure, str(packed.table["path"][row]).rsplit("/", 1)[-1]


def _course(course: Course) -> str:
    text = heading("Validation accuracy, epoch by epoch")
    text += plot(
        histories_plot({NAMES[name]: history for name, history in course.histories.items()}),
        "validation accuracy after each epoch",
    )
    text += heading("Loss and accuracy of the whole network's training")
    text += plot(
        learning_curves_plot(course.histories["train_full"], course.best_cycle),
        "training and validation loss, and validation accuracy, after each epoch; dotted lines end the cycles",
    )
    for name, (curve, picks) in course.curves.items():
        title = "Learning-rate finder: " + ("head" if name == "lr_find" else "whole network")
        text += heading(title) + plot(lr_find_plot(curve, picks), "change of the loss against learning rate")
    text += heading("Rates and losses of the whole network's training")
    return text + plot(rates_plot(course.batches), "learning rate and loss over iterations")
