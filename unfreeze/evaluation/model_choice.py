"""Model selection: the lowest log loss of the candidates not significantly less accurate than the most accurate."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unfreeze.evaluation.metrics import Scores, score
from unfreeze.evaluation.predicting import Probabilities

SIGNIFICANT = 0.05
"""Significance level of a difference in accuracy between candidates."""


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
    """Select the candidate with the lowest log loss of those not significantly less accurate than the most accurate.

    On a few hundred validation images a difference of two or three correct predictions is not significant: selecting by
    accuracy alone would often select the candidate that chance favours. Significance is tested by McNemar's exact test
    at 5 % (McNemar, 1947; Dietterich, 1998). Log loss compares the probabilities of all images, not only of borderline
    ones.

    Returns:
        The candidate, and the reason in a sentence.
    """
    top = max(candidates, key=lambda c: (c.scores.accuracy, -c.scores.loss))
    level = [candidate for candidate in candidates if not _worse(candidate, top)]
    best = min(level, key=lambda c: (c.scores.loss, -c.scores.accuracy))
    shown = ", ".join(f"{c.name} {c.scores.accuracy:.4f} and {c.scores.loss:.4f}" for c in candidates)
    if len(level) == 1:
        why = "it is significantly more accurate on the validation images than the others"
    elif len(level) == len(candidates):
        why = "none is significantly less accurate on the validation images, and it has the lowest log loss"
    else:
        names = ", ".join(c.name for c in level[:-1]) + f" and {level[-1].name}"
        why = f"the accuracies of {names} on the validation images are not significantly different, and it has the lowest log loss"
    return best, f"{best.name} is selected: {why} (accuracy and log loss: {shown})."


def _worse(candidate: Candidate, top: Candidate) -> bool:
    """Whether a candidate is significantly less accurate than the most accurate (McNemar's exact test, one-sided)."""
    from scipy.stats import binomtest

    mine, its = (c.probabilities.argmax(1) == c.labels for c in (candidate, top))
    lost, won = int((its & ~mine).sum()), int((mine & ~its).sum())
    return lost + won > 0 and float(binomtest(lost, lost + won, alternative="greater").pvalue) < SIGNIFICANT
