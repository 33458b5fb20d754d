"""Judging models: which candidate is handed on, and how good it is on a split."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from unfreeze.batches import Loader
from unfreeze.measuring import Scores, measure, score
from unfreeze.predicting import Probabilities, predict_tta
from unfreeze.resumable import ResumableFile
from unfreeze.settings import Augment

SIGNIFICANT = 0.05
"""Probability below which a difference between candidates is not put down to chance."""


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
    """The candidate to hand on: of those that are as accurate as the best, the one with the lowest log loss.

    On a few hundred validation images two or three more right ones are chance, and the candidate that chance favours most
    would win. As accurate as the best counts who cannot be told from it by McNemar's exact test at 5 % (McNemar, 1947;
    Dietterich, 1998); log loss then compares what each makes of every image, not only of those on the border.

    Returns:
        The candidate, and the reason in a sentence.
    """
    top = max(candidates, key=lambda c: (c.scores.accuracy, -c.scores.loss))
    level = [candidate for candidate in candidates if not _worse(candidate, top)]
    best = min(level, key=lambda c: (c.scores.loss, -c.scores.accuracy))
    shown = ", ".join(f"{c.name} {c.scores.accuracy:.4f} and {c.scores.loss:.4f}" for c in candidates)
    if len(level) == 1:
        why = "it is more accurate on the validation images than the others"
    elif len(level) == len(candidates):
        why = "all are as accurate on the validation images as far as can be told, and it has the lowest log loss"
    else:
        names = " and ".join(c.name for c in level)
        why = f"{names} are as accurate on the validation images as far as can be told, and it has the lower log loss"
    return best, f"{best.name} is handed on: {why} (accuracy and log loss: {shown})."


def _worse(candidate: Candidate, top: Candidate) -> bool:
    """Whether a candidate is less accurate than the most accurate one beyond chance, by McNemar's exact test, one-sided."""
    from scipy.stats import binomtest

    mine, its = (c.probabilities.argmax(1) == c.labels for c in (candidate, top))
    lost, won = int((its & ~mine).sum()), int((mine & ~its).sum())
    return lost + won > 0 and float(binomtest(lost, lost + won, alternative="greater").pvalue) < SIGNIFICANT


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
