"""The baseline: scikit-learn's logistic regression on the frozen backbone's activations."""

import warnings
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from unfreeze.models.classifier import Head

NEVER = -100.0
"""Logit of a class that was not in the training images."""


def fit_baseline(activations: NDArray[np.float32], labels: NDArray[np.int64]) -> Any:
    """Fit the regression on activations (N, F) and class numbers (N,)."""
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # With few images per class scikit-learn suspects a regression problem.
        warnings.filterwarnings("ignore", "The number of unique classes is greater than 50%", UserWarning)
        return LogisticRegression(max_iter=1000).fit(activations, labels)


def baseline_probabilities(model: Any, activations: NDArray[np.float32], classes: int) -> NDArray[np.float32]:
    """Probabilities (N, C) for activations (N, F); 0 for a class that was not in the training images."""
    probabilities = np.zeros((len(activations), classes), np.float32)
    probabilities[:, model.classes_] = model.predict_proba(activations)
    return probabilities


def baseline_head(model: Any, features: int, classes: int) -> Head:
    """The regression as a head in eval mode; with the backbone it is a classifier like the trained ones."""
    head = Head(features, classes, dropout=0.0).eval()
    logits = head.logits
    weight, bias = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # `coef_` then has a single row: the logit of the second class
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    with torch.no_grad():
        cast(torch.Tensor, head.norm.running_var).fill_(1 - head.norm.eps)  # makes BatchNorm the identity
        logits.weight.zero_()
        logits.bias.fill_(NEVER)
        logits.weight[model.classes_] = torch.from_numpy(weight).float()
        logits.bias[model.classes_] = torch.from_numpy(bias).float()
    return head
