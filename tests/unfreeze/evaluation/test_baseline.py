"""The logistic regression, which is the baseline for every accuracy."""

import numpy as np
import pytest
import torch

from unfreeze.evaluation.baseline import baseline_head, baseline_probabilities, fit_baseline


def activations(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(len(labels), 20)) + 2 * np.eye(20)[labels]).astype(np.float32)


def test_probabilities_are_the_softmax_of_the_fitted_weights() -> None:
    labels = np.random.default_rng(1).integers(0, 3, 200)
    inputs = activations(labels)
    model = fit_baseline(inputs, labels)
    logits = inputs @ model.coef_.T + model.intercept_
    odds = np.exp(logits - logits.max(1, keepdims=True))
    expected = odds / odds.sum(1, keepdims=True)
    assert baseline_probabilities(model, inputs, 3) == pytest.approx(expected, abs=1e-5)
    assert (expected.argmax(1) == labels).mean() > 0.8


@pytest.mark.filterwarnings("error")
def test_an_image_or_two_of_each_class_are_no_regression_problem() -> None:
    labels = np.arange(30) % 20
    assert fit_baseline(activations(labels), labels).classes_.tolist() == list(range(20))


def test_a_class_without_training_images_keeps_its_column() -> None:
    labels = np.random.default_rng(2).choice([0, 2], 100)
    inputs = activations(labels)
    probabilities = baseline_probabilities(fit_baseline(inputs, labels), inputs, 4)
    assert probabilities.shape == (100, 4)
    assert (probabilities[:, [1, 3]] == 0).all()
    assert probabilities.sum(1) == pytest.approx(1)


def test_the_same_data_gives_the_same_model() -> None:
    labels = np.random.default_rng(3).integers(0, 2, 100)
    first, second = (fit_baseline(activations(labels), labels) for _ in range(2))
    assert (first.coef_ == second.coef_).all()


@pytest.mark.parametrize("known", [[0, 1], [0, 2], [0, 1, 2, 3], [1, 2, 3]])
def test_as_a_head_it_predicts_the_same(known: list[int]) -> None:
    labels = np.random.default_rng(4).choice(known, 100)
    inputs = activations(labels)
    model = fit_baseline(inputs, labels)
    with torch.no_grad():
        probabilities = baseline_head(model, 20, 4)(torch.from_numpy(inputs)).softmax(1).numpy()
    assert probabilities == pytest.approx(baseline_probabilities(model, inputs, 4), abs=1e-5)
