"""The honest baseline: scikit-learn's logistic regression on the frozen backbone's activations."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def fit_baseline(activations: NDArray[np.float32], labels: NDArray[np.int64]) -> Any:
    """Fit the regression on activations (N, F) and class numbers (N,)."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=1000).fit(activations, labels)


def baseline_probabilities(model: Any, activations: NDArray[np.float32], classes: int) -> NDArray[np.float32]:
    """Probabilities (N, C) for activations (N, F); 0 for a class that was not in the training images."""
    probabilities = np.zeros((len(activations), classes), np.float32)
    probabilities[:, model.classes_] = model.predict_proba(activations)
    return probabilities
