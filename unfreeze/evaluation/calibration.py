"""Calibration by temperature scaling: of the predictions with a confidence of 90 %, 90 % should be correct.

Networks are usually overconfident. Dividing the logits by one number, the temperature, corrects most of that without
changing the predicted class (Guo et al., On Calibration of Modern Neural Networks, 2017).
"""

import math

from unfreeze.evaluation.metrics import Labels, score
from unfreeze.evaluation.predicting import ViewPredictions

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
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        both = found.averaged(math.exp(log_temperature))
        likelihood = sum(score(probabilities, labels).loss for probabilities in both) / len(both)
        return len(labels) * likelihood + (log_temperature / SPREAD) ** 2 / 2

    low, high = map(math.log, LIMITS)
    return math.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x)
