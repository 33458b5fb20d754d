"""Class imbalance: class weights in the loss, or sampling of every class equally often."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from unfreeze.settings.schema import Train


def class_weights(labels: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    """Weight of each class (C,), in inverse proportion to its number of images; 1 if all classes have the same size.

    scikit-learn's "balanced" weights. A class without images has the weight 0.

    Args:
        labels: class numbers of the training images (N,).
        classes: how many classes there are.
    """
    from sklearn.utils.class_weight import compute_class_weight  # here, as importing it takes seconds

    present, weights = np.unique(labels), np.zeros(classes)
    weights[present] = compute_class_weight("balanced", classes=present, y=labels)
    return weights


def make_loss(train: Train, labels: NDArray[np.int64], classes: int, device: torch.device) -> nn.CrossEntropyLoss:
    """Cross-entropy with the settings' label smoothing, and with class weights if ``train.balance`` is ``loss``.

    Args:
        train: the settings.
        labels: class numbers of the training images (N,).
        classes: how many classes there are.
        device: where the loss is computed.
    """
    weights = torch.from_numpy(class_weights(labels, classes)).float() if train.balance == "loss" else None
    return nn.CrossEntropyLoss(weights, label_smoothing=train.label_smoothing).to(device)


def sampling_probabilities(train: Train, labels: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """Probability of each training image (N,) to be drawn next, for `unfreeze.batches.loader.shuffled`.

    If ``train.balance`` is ``sampler``, every class has the same share. Otherwise None: every image is used once an
    epoch.
    """
    if train.balance != "sampler":
        return None
    weights = class_weights(labels, int(labels.max()) + 1)[labels]
    return np.asarray(weights / weights.sum())
