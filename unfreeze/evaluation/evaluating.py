"""Judging models: which candidate is handed on, and how good it is on a split."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from unfreeze.batches.loader import Loader
from unfreeze.evaluation.metrics import measure
from unfreeze.evaluation.predicting import Probabilities, predict_tta
from unfreeze.persistence.resumable import ResumableFile
from unfreeze.settings.schema import Augment


@dataclass(frozen=True)
class Predictions:
    """Probabilities (N, C) for the images of ``rows`` (N,), plain and averaged over views."""

    rows: NDArray[np.int64]
    plain: Probabilities
    tta: Probabilities


def evaluate_split(
    model: nn.Module,
    loader: Loader,
    rows: NDArray[np.int64],
    baseline: Probabilities,
    augment: Augment,
    tta_views: int,
    kept: ResumableFile | None = None,
) -> tuple[Predictions, dict[str, float]]:
    """Predict one split with and without TTA and measure both beside the baseline.

    Args:
        model: the classifier.
        loader: of the packed images.
        rows: (N,) row numbers of the split, at least one.
        baseline: (N, C) probabilities of the logistic regression on the frozen activations.
        augment: what the model was trained with, which the views stay within.
        tta_views: how many views.
        kept: where to keep what is predicted, and to go on from (`predict_tta`).

    Returns:
        The predictions, and accuracy, macro F1 and log loss: plain, with prefix ``tta_`` and with prefix ``baseline_``.
    """
    plain, tta = predict_tta(model, loader, rows, augment, tta_views, kept)
    labels, classes = loader.packed.labels[rows], loader.packed.classes
    metrics: dict[str, float] = {}
    for prefix, probabilities in (("", plain), ("tta_", tta), ("baseline_", baseline)):
        metrics |= {f"{prefix}{k}": v for k, v in measure(labels, probabilities, classes).items()}
    return Predictions(rows, plain, tta), metrics
