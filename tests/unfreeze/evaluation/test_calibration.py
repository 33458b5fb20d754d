"""Calibration: known temperatures, and the calibration error computed by hand."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from unfreeze.evaluation.calibration import LIMITS, fit_temperature, score_calibrated
from unfreeze.evaluation.metrics import calibration_error_by_chance, expected_calibration_error, reliability, score
from unfreeze.evaluation.predicting import ViewPredictions, with_temperature
from unfreeze.models.classifier import Head


def drawn(count: int, classes: int, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Logits (N, C), and labels drawn from their probabilities, so that the correct temperature is 1."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (count, classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    return logits, labels


def fitted(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Temperature for predictions whose views equal the plain images."""
    return fit_temperature(ViewPredictions(probabilities, probabilities, np.arange(len(labels))), labels)


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float32]:
    return torch.from_numpy(logits).softmax(1).float().numpy()


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_the_temperature_is_found(classes: int, true: float) -> None:
    logits, labels = drawn(4000, classes)
    assert fitted(softmax(logits * true), labels) == pytest.approx(true, rel=0.1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_probabilities_of_divided_logits(temperature: float) -> None:
    logits, _ = drawn(50, 5)
    np.testing.assert_allclose(
        with_temperature(softmax(logits), temperature), softmax(logits / temperature), rtol=1e-4, atol=1e-6
    )


def test_calibration_changes_no_prediction_and_lowers_log_loss_and_error_on_other_images() -> None:
    logits, labels = drawn(2000, 4)
    sure = softmax(3 * logits)
    calibrated = with_temperature(sure[1000:], fitted(sure[:1000], labels[:1000]))
    np.testing.assert_array_equal(calibrated.argmax(1), sure[1000:].argmax(1))
    assert score(calibrated, labels[1000:]).loss < score(sure[1000:], labels[1000:]).loss
    before, after = (expected_calibration_error(p, labels[1000:]) for p in (sure[1000:], calibrated))
    assert before > 0.1 > 0.05 > after


def test_the_calibrated_loss_compares_networks_of_different_confidence_by_what_they_know() -> None:
    logits, labels = drawn(2000, 4)
    noise = np.random.default_rng(1).normal(size=logits.shape)
    vague, known, sure = (score_calibrated(softmax(x), labels) for x in (logits + noise, logits, 3 * logits))
    assert known.loss < vague.loss < sure.loss
    assert sure.calibrated_loss == pytest.approx(known.calibrated_loss, rel=1e-3)
    assert known.calibrated_loss == pytest.approx(known.loss, rel=0.01)
    assert vague.calibrated_loss is not None and sure.calibrated_loss is not None
    assert sure.calibrated_loss < vague.calibrated_loss < vague.loss
    assert (sure.loss, sure.accuracy) == (score(softmax(3 * logits), labels).loss, known.accuracy)


@pytest.mark.parametrize("count", [3, 30, 300])
def test_where_all_are_right_the_temperature_is_not_0(count: int) -> None:
    labels = np.arange(count) % 3
    probabilities = softmax(np.eye(3)[labels] * 6.0)
    assert 0.4 < fitted(probabilities, labels) < 1


def test_probabilities_of_0_and_1_are_no_trouble() -> None:
    labels = np.array([0, 1, 0, 1])
    probabilities = np.eye(2, dtype=np.float32)[[0, 1, 0, 0]]
    temperature = fitted(probabilities, labels)
    assert LIMITS[0] <= temperature <= LIMITS[1]
    assert np.isfinite(with_temperature(probabilities, temperature)).all()


def test_averages_have_the_temperature_inside() -> None:
    logits, _ = drawn(30, 4)
    views = softmax(logits.reshape(10, 3, 4).reshape(30, 4))
    found = ViewPredictions(softmax(logits[:10]), views, np.repeat(np.arange(10), 3))
    plain, tta = found.averaged(2.0)
    np.testing.assert_allclose(plain, softmax(logits[:10] / 2), rtol=1e-4)
    np.testing.assert_allclose(tta, (plain + softmax(logits / 2).reshape(10, 3, 4).mean(1)) / 2, rtol=1e-4)


def test_expected_calibration_error_by_hand() -> None:
    probabilities = np.array([[0.95, 0.05], [0.91, 0.09], [0.35, 0.65], [0.62, 0.38]])
    labels = np.array([0, 1, 1, 0])
    table = reliability(probabilities, labels, bins=10)
    assert table["images"].tolist() == [2, 2]
    assert table["confidence"].tolist() == pytest.approx([0.635, 0.93])
    assert table["accuracy"].tolist() == [1.0, 0.5]
    assert expected_calibration_error(probabilities, labels, bins=10) == pytest.approx((0.365 + 0.43) / 2)


@pytest.mark.parametrize(("images", "expected"), [(300, 0.065), (30000, 0.0065)])  # proportional to 1 / sqrt(images)
def test_calibration_error_by_chance_is_that_of_calibrated_probabilities(images: int, expected: float) -> None:
    # Probabilities are perfectly calibrated for labels that are drawn from them. Draw ten sets of labels.
    generator = np.random.default_rng(1)
    probabilities = generator.dirichlet(np.full(4, 0.5), images)
    ranks = [(probabilities.cumsum(1) < generator.random((images, 1))).sum(1) for _ in range(10)]
    seen = np.mean([expected_calibration_error(probabilities, labels) for labels in ranks])
    found = calibration_error_by_chance(probabilities)
    assert found == pytest.approx(seen, rel=0.15)
    assert found == pytest.approx(expected, rel=0.15)


def test_calibration_error_by_chance_of_certainty_is_zero() -> None:
    assert calibration_error_by_chance(np.eye(3)) == 0


def test_certainty_is_in_the_last_bin() -> None:
    assert expected_calibration_error(np.eye(3)[[0, 1, 2]], np.array([0, 1, 2])) == 0


def test_a_head_divides_by_its_temperature_in_eval_mode_only_and_keeps_it_with_its_weights() -> None:
    head, activations = Head(4, 3, dropout=0.0), torch.randn(8, 4)
    weights = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    predicted, trained = head.eval()(activations), head.train()(activations)
    head.load_state_dict(weights | {"2.temperature": torch.tensor(2.0)})
    torch.testing.assert_close(head.eval()(activations), predicted / 2)
    torch.testing.assert_close(head.train()(activations), trained)
    assert head.state_dict()["2.temperature"] == 2
