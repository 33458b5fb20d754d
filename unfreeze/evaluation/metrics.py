"""Metrics of predictions: accuracy and its interval, calibration error, confusion matrix, images to look at."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Labels = NDArray[np.int64]
BINS = 15
"""Bins of equal width that confidence is divided into, as in Guo et al. (2017)."""
DRAWS = 200
"""Number of simulations to estimate the calibration error by chance."""


def accuracy_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % Wilson score interval (1927) of an accuracy, ``correct`` of ``total``; (0, 1) if ``total`` is 0."""
    if not total:
        return 0.0, 1.0
    from scipy.stats import binomtest  # here, as it takes a second to import

    low, high = binomtest(correct, total).proportion_ci(method="wilson")
    return float(low), float(high)


@dataclass(frozen=True)
class Scores:
    """Mean cross-entropy (log loss) and accuracy of predictions; the log loss after temperature scaling, if computed."""

    loss: float
    accuracy: float
    calibrated_loss: float | None = None


def score(probabilities: NDArray[Any], labels: Labels) -> Scores:
    """Log loss and accuracy of probabilities (N, C) for class numbers (N,)."""
    likelihood = probabilities[np.arange(len(labels)), labels].astype(float)
    loss = -np.log(np.clip(likelihood, 1e-7, 1)).mean()
    return Scores(float(loss), float((probabilities.argmax(1) == labels).mean()))


def measure(labels: Labels, probabilities: NDArray[Any]) -> dict[str, float]:
    """Metrics of probabilities (N, C) for class numbers (N,).

    Accuracy, macro F1, log loss, expected calibration error (ece), and the ece that a perfectly calibrated
    model would have (ece_by_chance).
    """
    from sklearn.metrics import f1_score

    scores = score(probabilities, labels)
    return {
        "accuracy": scores.accuracy,
        "macro_f1": float(f1_score(labels, probabilities.argmax(1), average="macro")),  # of the classes that occur
        "log_loss": scores.loss,
        "ece": expected_calibration_error(probabilities, labels),
        "ece_by_chance": calibration_error_by_chance(probabilities),
    }


def reliability(probabilities: NDArray[Any], labels: Labels, bins: int = BINS) -> pd.DataFrame:
    """Reliability table: confidence and accuracy of predictions, binned by confidence.

    Args:
        probabilities: (N, C).
        labels: (N,) class numbers.
        bins: number of bins of equal width.

    Returns:
        A row per bin that has images: confidence and accuracy (their means), images (their number), and low and high,
        the 95 % interval of the accuracy.
    """
    confidence = probabilities.max(1).astype(float)
    right = probabilities.argmax(1) == labels
    table = pd.DataFrame({"confidence": confidence, "accuracy": right.astype(float), "images": 1})
    table = table.groupby(_bin_of(confidence, bins)).agg({"confidence": "mean", "accuracy": "mean", "images": "sum"})
    correct = (table["accuracy"] * table["images"]).round()
    bounds = [accuracy_interval(int(some), int(all_)) for some, all_ in zip(correct, table["images"], strict=True)]
    table[["low", "high"]] = bounds
    return table


def expected_calibration_error(probabilities: NDArray[Any], labels: Labels, bins: int = BINS) -> float:
    """Mean absolute difference of confidence and accuracy in the bins of `reliability`, weighted by images, 0 to 1."""
    return _calibration_error(probabilities.max(1).astype(float), probabilities.argmax(1) == labels, bins)


def calibration_error_by_chance(probabilities: NDArray[Any]) -> float:
    """The expected calibration error that these probabilities (N, C) would have if they were perfectly calibrated.

    The fewer images are in a bin, the further its accuracy is from its confidence by chance. The result is the mean of
    the error over `DRAWS` simulations, in which each prediction is correct with a probability equal to its confidence
    (Bröcker and Smith, Increasing the Reliability of Reliability Diagrams, 2007).
    """
    confidence, generator = probabilities.max(1).astype(float), np.random.default_rng(0)
    draws = (generator.random(len(confidence)) < confidence for _ in range(DRAWS))
    return float(np.mean([_calibration_error(confidence, right, BINS) for right in draws]))


def _calibration_error(confidence: NDArray[np.float64], right: NDArray[np.bool_], bins: int) -> float:
    differences = np.bincount(_bin_of(confidence, bins), right - confidence)
    return float(np.abs(differences).sum() / len(confidence))


def _bin_of(confidence: NDArray[np.float64], bins: int) -> NDArray[np.int64]:
    return np.minimum((confidence * bins).astype(np.int64), bins - 1)


def confusion(labels: Labels, predicted: Labels, classes: int) -> Labels:
    """Confusion matrix (C, C): row true class, column predicted class."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def per_class(labels: Labels, predicted: Labels, classes: list[str]) -> pd.DataFrame:
    """Precision, recall, F1 and support of each class, with the classes as index; 0 where the denominator is 0.

    Args:
        labels, predicted: (N,) class numbers, N at least 1.
        classes: names of all classes.
    """
    from sklearn.metrics import precision_recall_fscore_support

    found = precision_recall_fscore_support(labels, predicted, labels=range(len(classes)), zero_division=0)
    columns = dict(zip(("precision", "recall", "f1", "support"), found, strict=True))
    return pd.DataFrame(columns, index=pd.Index(classes, name="class"))


def most_confused(matrix: Labels, classes: list[str]) -> pd.DataFrame:
    """Pairs of classes that are taken for each other: true, predicted, count; most first."""
    wrong = matrix - np.diag(matrix.diagonal())
    true, predicted = np.nonzero(wrong)
    pairs = pd.DataFrame(
        {
            "true": [classes[i] for i in true],
            "predicted": [classes[i] for i in predicted],
            "count": wrong[true, predicted],
        }
    )
    return pairs.sort_values("count", ascending=False, ignore_index=True, kind="stable")


def gallery_places(labels: Labels, probabilities: NDArray[Any], kind: str, count: int, seed: int) -> Labels:
    """Indices of the images to look at among N predictions, selected as in the fast.ai lesson.

    Args:
        labels: (N,) class numbers.
        probabilities: (N, C).
        kind: ``random_right``, ``random_wrong``, ``most_right`` (the correct predictions with the highest confidence,
            alternating between the true classes), ``most_wrong`` (the same for wrong predictions) or
            ``most_uncertain`` (smallest difference between the two highest probabilities).
        count: how many at most.
        seed: for the random ones.
    """
    predicted = probabilities.argmax(1)
    top = np.sort(probabilities, 1)
    places = {
        "right": np.flatnonzero(predicted == labels),
        "wrong": np.flatnonzero(predicted != labels),
        "uncertain": np.arange(len(labels)),
    }[kind.split("_")[1]]
    if kind.startswith("random"):
        return np.random.default_rng(seed).permutation(places)[:count]
    if kind == "most_uncertain":
        return places[np.argsort(top[places, -1] - top[places, -2], kind="stable")][:count]
    surest = places[np.argsort(-top[places, -1], kind="stable")]
    turn = pd.Series(labels[surest]).groupby(labels[surest]).cumcount().to_numpy()
    return surest[np.argsort(turn, kind="stable")][:count]
