"""Metrics, compared with scikit-learn's, and with formulas and matrices computed by hand."""

import numpy as np
import pytest
from sklearn import metrics

from unfreeze.evaluation.metrics import (
    accuracy_interval,
    calibration_error_by_chance,
    confusion,
    expected_calibration_error,
    gallery_places,
    measure,
    most_confused,
    per_class,
)

CLASSES = ["a", "b", "c", "d"]


def predictions(seed: int, count: int = 300) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(CLASSES), count)
    logits = rng.normal(size=(count, len(CLASSES)))
    logits[np.arange(count), labels] += 1
    odds = np.exp(logits)
    return labels, odds / odds.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_is_newcombes(correct: int, total: int, low: float, high: float) -> None:
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    assert accuracy_interval(correct, total) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_measures_are_scikit_learns(seed: int) -> None:
    labels, probabilities = predictions(seed)
    predicted = probabilities.argmax(1)
    assert measure(labels, probabilities) == pytest.approx(
        {
            "accuracy": metrics.accuracy_score(labels, predicted),
            "macro_f1": metrics.f1_score(labels, predicted, average="macro"),
            "log_loss": metrics.log_loss(labels, probabilities, labels=range(4)),
            "ece": expected_calibration_error(probabilities, labels),  # scikit-learn does not have this metric
            "ece_by_chance": calibration_error_by_chance(probabilities),
        }
    )


def test_macro_f1_leaves_out_a_class_that_nobody_saw() -> None:
    labels, probabilities = predictions(0)
    padded = np.hstack([probabilities, np.zeros((len(labels), 1))])
    assert measure(labels, padded)["macro_f1"] == pytest.approx(
        metrics.f1_score(labels, padded.argmax(1), average="macro")
    )


def test_a_probability_of_zero_costs_much_but_not_infinity() -> None:
    loss = measure(np.array([0]), np.array([[0.0, 1.0]]))["log_loss"]
    assert 10 < loss < 20


def test_confusion_and_classes_are_scikit_learns() -> None:
    labels, probabilities = predictions(1)
    predicted = probabilities.argmax(1)
    matrix = confusion(labels, predicted, 4)
    assert (matrix == metrics.confusion_matrix(labels, predicted, labels=range(4))).all()
    expected = metrics.precision_recall_fscore_support(labels, predicted, labels=range(4))
    table = per_class(labels, predicted, CLASSES)
    assert list(table.index) == CLASSES
    for name, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert table[name].to_numpy() == pytest.approx(values)


def test_a_class_without_images_has_zeros() -> None:
    found = per_class(np.array([1, 1, 1, 1]), np.array([0, 0, 0, 1]), ["a", "b"])
    assert found.loc["a"].tolist() == [0, 0, 0, 0] and found.loc["b"].tolist() == [1, 0.25, 0.4, 4]


def test_most_confused_by_hand() -> None:
    matrix = np.array([[9, 2, 0], [5, 7, 1], [0, 0, 3]])
    pairs = most_confused(matrix, ["x", "y", "z"])
    assert pairs.to_numpy().tolist() == [["y", "x", 5], ["x", "y", 2], ["y", "z", 1]]
    assert most_confused(np.diag([3, 4]), ["x", "y"]).empty


def test_galleries_by_hand() -> None:
    labels = np.array([0, 0, 0, 1])
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.55, 0.45]])
    assert gallery_places(labels, probabilities, "most_right", 9, 0).tolist() == [0, 1]
    assert gallery_places(labels, probabilities, "most_wrong", 9, 0).tolist() == [2, 3]
    assert gallery_places(labels, probabilities, "most_uncertain", 2, 0).tolist() == [3, 1]
    assert sorted(gallery_places(labels, probabilities, "random_right", 9, 0)) == [0, 1]
    assert sorted(gallery_places(labels, probabilities, "random_wrong", 9, 0)) == [2, 3]


def test_uncertain_means_a_small_lead_not_a_small_probability() -> None:
    probabilities = np.array([[0.40, 0.05, 0.05, 0.50], [0.40, 0.20, 0.20, 0.20]])
    assert gallery_places(np.array([0, 0]), probabilities, "most_uncertain", 1, 0).tolist() == [0]


def test_random_galleries_follow_the_seed() -> None:
    labels, probabilities = predictions(2)
    first, again, other = (gallery_places(labels, probabilities, "random_right", 12, seed) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize("kind", ["random_right", "random_wrong", "most_right", "most_wrong", "most_uncertain"])
def test_galleries_of_nothing_are_empty(kind: str) -> None:
    assert len(gallery_places(np.array([], np.int64), np.zeros((0, 3)), kind, 5, 0)) == 0


def test_the_interval_stays_between_0_and_1() -> None:
    for total in range(1, 60):
        assert 0 <= accuracy_interval(0, total)[0] < 1e-12
        assert 1 - 1e-12 < accuracy_interval(total, total)[1] <= 1
    assert accuracy_interval(0, 0) == (0, 1)


def test_true_classes_take_turns_among_the_surest() -> None:
    labels = np.array([0, 0, 0, 1])
    probabilities = np.array([[0.99, 0.01], [0.98, 0.02], [0.97, 0.03], [0.3, 0.7]])
    assert gallery_places(labels, probabilities, "most_right", 3, 0).tolist() == [0, 3, 1]
