"""Evaluate a model on a split: its calibrated predictions with and without TTA, and their metrics."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unfreeze.data.packed import PackedImages
from unfreeze.evaluation.calibration import fit_temperature
from unfreeze.evaluation.metrics import expected_calibration_error, measure, score
from unfreeze.evaluation.predicting import Probabilities, ViewPredictions


@dataclass(frozen=True)
class Predictions:
    """Probabilities (N, C) for the images of ``rows`` (N,): plain, averaged over views, and plain before calibration."""

    rows: NDArray[np.int64]
    plain: Probabilities
    tta: Probabilities
    uncalibrated: Probabilities


@dataclass(frozen=True)
class Evaluation:
    """Predictions for a split, their metrics, and the temperature, by which the logits were divided."""

    predictions: Predictions
    metrics: dict[str, float]
    temperature: float


def evaluate_split(
    found: ViewPredictions,
    rows: NDArray[np.int64],
    packed: PackedImages,
    baseline: Probabilities,
    temperature: float | None = None,
) -> Evaluation:
    """Calibrate a model's predictions of one split, and measure them with and without TTA beside the baseline.

    Args:
        found: the model's predictions without a temperature (`predict_tta`).
        rows: (N,) row numbers of the split, at least one.
        packed: the images.
        baseline: (N, C) probabilities of the logistic regression on the frozen activations.
        temperature: divisor of the logits; fitted to these predictions if None.

    Returns:
        The evaluation. Its metrics are those of `measure` for the plain predictions (no prefix), the predictions with
        TTA (``tta_``) and the baseline (``baseline_``), and log loss and ece of the plain predictions before
        calibration (``uncalibrated_``).
    """
    labels = packed.labels[rows]
    temperature = fit_temperature(found, labels) if temperature is None else temperature
    plain, tta = found.averaged(temperature)
    metrics: dict[str, float] = {}
    for prefix, probabilities in (("", plain), ("tta_", tta), ("baseline_", baseline)):
        metrics |= {f"{prefix}{name}": value for name, value in measure(labels, probabilities).items()}
    metrics["uncalibrated_log_loss"] = score(found.plain, labels).loss
    metrics["uncalibrated_ece"] = expected_calibration_error(found.plain, labels)
    return Evaluation(Predictions(rows, plain, tta, found.plain), metrics, temperature)
