"""Judging models: which candidate is handed on, and how good it is on a split."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from unfreeze.batches import Loader
from unfreeze.measuring import measure
from unfreeze.predicting import Probabilities, Scores, predict, predict_tta, score


@dataclass(frozen=True)
class Candidate:
    """A trained model by name, with its probabilities (N, C) for the validation images and their labels (N,)."""

    name: str
    probabilities: Probabilities
    labels: NDArray[np.int64]

    @property
    def scores(self) -> Scores:
        """Log loss and accuracy on the validation split."""
        return score(self.probabilities, self.labels)


def choose(candidates: list[Candidate]) -> tuple[Candidate, str]:
    """The candidate with the highest validation accuracy; among equals the one with the lowest log loss.

    Returns:
        The candidate, and the reason in a sentence.
    """
    ranked = sorted(candidates, key=lambda c: (-c.scores.accuracy, c.scores.loss))
    best, rest = ranked[0], ranked[1:]
    others = ", ".join(f"{c.name} {c.scores.accuracy:.4f}" for c in rest)
    tie = rest and rest[0].scores.accuracy == best.scores.accuracy
    why = "the highest validation accuracy" + (", and of those equal the lowest log loss" if tie else "")
    return best, f"{best.name} is handed on: {why} ({best.scores.accuracy:.4f}; {others})."


def head_probabilities(head: nn.Module, activations: NDArray[np.float32]) -> Probabilities:
    """Probabilities (N, C) of a head for precomputed activations (N, F)."""
    head.eval()
    with torch.inference_mode():
        return head(torch.from_numpy(np.array(activations))).softmax(1).numpy()


@dataclass(frozen=True)
class Predictions:
    """Probabilities (N, C) for the images of ``rows`` (N,), plain and averaged over views."""

    rows: NDArray[np.int64]
    plain: Probabilities
    tta: Probabilities


def evaluate_split(
    model: nn.Module, loader: Loader, rows: NDArray[np.int64], baseline: Probabilities, flip: str, tta_views: int
) -> tuple[Predictions, dict[str, float]]:
    """Predict one split with and without TTA and measure both beside the baseline.

    Args:
        model: the classifier.
        loader: of the packed images.
        rows: (N,) row numbers of the split.
        baseline: (N, C) probabilities of the logistic regression on the frozen activations.
        flip: symmetries of the views.
        tta_views: how many views.

    Returns:
        The predictions, and accuracy, macro F1 and log loss: plain, with prefix ``tta_`` and with prefix ``baseline_``.
    """
    plain = predict(model, loader.plain(rows))
    tta = predict_tta(model, loader, rows, plain, flip, tta_views)
    labels, classes = loader.packed.labels[rows], loader.packed.classes
    metrics: dict[str, float] = {}
    for prefix, probabilities in (("", plain), ("tta_", tta), ("baseline_", baseline)):
        metrics |= {f"{prefix}{k}": v for k, v in measure(labels, probabilities, classes).items()}
    return Predictions(rows, plain, tta), metrics
