"""Calibration by temperature scaling: of the predictions with a confidence of 90 %, 90 % should be correct.

Networks are usually overconfident. Dividing the logits by one number, the temperature, corrects most of that without
changing the predicted class (Guo et al., On Calibration of Modern Neural Networks, 2017).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

from unfreeze.evaluation.metrics import Labels, Scores, score
from unfreeze.evaluation.predicting import Probabilities, ViewPredictions, with_temperature

LIMITS = (0.1, 10.0)
"""Bounds of the search for a temperature."""
SPREAD = 0.5
"""Standard deviation of the prior of the temperature's logarithm (mean 0): most temperatures are from 0.6 to 1.6."""


def fit_temperature(found: ViewPredictions, labels: Labels) -> float:
    """The maximum a posteriori temperature, fitted on images that the model was not trained on.

    The log-likelihood is the mean of the values with and without TTA, because both predictions are used. The prior
    matters only if there are few images, or nearly all predictions are correct: without it, the best temperature is 0
    if all predictions are correct, which means a confidence of 1 for every image.

    Args:
        found: the model's predictions for N images without a temperature.
        labels: (N,) class numbers.
    """
    return _best_temperature(found.averaged, labels)


def score_calibrated(probabilities: Probabilities, labels: Labels) -> Scores:
    """Log loss and accuracy of probabilities (N, C) for class numbers (N,), and the log loss after temperature scaling.

    The temperature is fitted to the same predictions, as by `fit_temperature`.
    """
    temperature = _best_temperature(lambda temperature: [with_temperature(probabilities, temperature)], labels)
    calibrated = score(with_temperature(probabilities, temperature), labels).loss
    return dataclasses.replace(score(probabilities, labels), calibrated_loss=calibrated)


def _best_temperature(predict: Callable[[float], Sequence[Probabilities]], labels: Labels) -> float:
    """The temperature with the highest posterior; ``predict`` returns the predictions at a temperature."""
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        found = predict(math.exp(log_temperature))
        likelihood = sum(score(probabilities, labels).loss for probabilities in found) / len(found)
        return len(labels) * likelihood + (log_temperature / SPREAD) ** 2 / 2

    low, high = map(math.log, LIMITS)
    return math.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x)
