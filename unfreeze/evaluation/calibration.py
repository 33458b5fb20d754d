"""Calibration: of the images that a model is 90 % sure of, 90 % should be right.

Networks are mostly surer than they are right. One number, the temperature, mends most of that: logits are divided by it,
which changes no prediction (Guo et al., On Calibration of Modern Neural Networks, 2017).
"""

import math

from unfreeze.evaluation.metrics import Labels, score
from unfreeze.evaluation.predicting import ViewPredictions

LIMITS = (0.1, 10.0)
"""Between these a temperature is looked for."""
SPREAD = 0.5
"""Standard deviation of the prior of a temperature's logarithm, whose mean is 0: most are between 0.6 and 1.6."""


def fit_temperature(found: ViewPredictions, labels: Labels) -> float:
    """The temperature that fits images which the model was not trained on: its posterior's maximum.

    The likelihood is that of the plain predictions and of those with TTA, by half each, as both are used. The prior counts
    for something only where images are few, or nearly all right: without it, the best temperature for images that are all
    right is 0, which says that no image ever will be wrong.

    Args:
        found: what the model predicts for N images without a temperature.
        labels: (N,) class numbers.
    """
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        both = found.averaged(math.exp(log_temperature))
        likelihood = sum(score(probabilities, labels).loss for probabilities in both) / len(both)
        return len(labels) * likelihood + (log_temperature / SPREAD) ** 2 / 2

    low, high = map(math.log, LIMITS)
    return math.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x)
