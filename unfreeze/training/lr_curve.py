"""The learning-rate finder's curve: how the loss changes at each rate, and points of it to pick a rate by.

The LR range test is Smith's (Cyclical Learning Rates for Training Neural Networks, 2017). From batch to batch the loss
varies by more than it falls in a whole sweep. The curve is therefore the change of each batch's loss against the
starting weights' loss of the same batch (a control variate), smoothed, with its standard error.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from unfreeze.errors import UserError

Floats = NDArray[np.float64]
COLUMNS = ("rate", "loss", "change", "smoothed", "error")
DIVERGED = 1.5
"""The loss has diverged when it is more than this many times log(classes), the loss of a uniform prediction.

A network that has forgotten everything gives nearly the same prediction for all images, so the curve often has a
plateau near the loss of the uniform prediction. At higher rates it rises steeply, and the rate varies little between
seeds (benchmarks/notes/choices.md)."""


@dataclass(frozen=True)
class Picks:
    """Points of a curve, as learning rates.

    Attributes:
        minimum: rate of the lowest smoothed loss.
        midpoint: rate at which half of the descent from the starting weights' loss to the lowest loss is done; `minimum`
            if there is no descent.
        divergence: highest rate before the loss diverges (`DIVERGED`); the last rate if it does not.
        steepest: rate at which the smoothed loss falls fastest, on the way to its minimum.
        valley: rate two thirds into the longest decreasing subsequence of the smoothed losses (fastai's valley rule).
    """

    minimum: float
    midpoint: float
    divergence: float
    steepest: float
    valley: float


def make_curve(rates: Floats, losses: Floats, starting: Floats) -> pd.DataFrame:
    """The curve of a sweep, one row per rate.

    The standard error is that of a weighted mean; the variance of each batch is estimated from its neighbours.

    Args:
        rates: (n,) rising learning rates.
        losses: (n,) finite loss of the batch at each rate.
        starting: (n,) the starting weights' loss of the same batch.

    Returns:
        Columns rate, loss, change (loss less the starting weights' loss), smoothed and error (of the smoothed change).
    """
    change = np.asarray(losses, float) - starting
    weights = _weights(len(change))
    smoothed = weights @ change
    error = np.sqrt(np.square(weights).sum(1) * (weights @ _variance(change)))
    return pd.DataFrame(dict(zip(COLUMNS, (rates, losses, change, smoothed, error), strict=True)), dtype=float)


def _weights(batches: int) -> Floats:
    """Weights (n, n) of a Gaussian moving average; row i is centred at batch i.

    The standard deviation is a thirtieth of the sweep. Unlike a running mean, this average has no lag: in a sweep of
    few batches, a lag could shift the minimum by a factor of ten, the factor by which `pick_rate` goes below it.
    """
    width = max(1.0, batches / 30)
    at = np.arange(batches)
    weights = np.exp(-0.5 * np.square((at[:, None] - at) / width))
    return weights / weights.sum(1, keepdims=True)


def _variance(change: Floats) -> Floats:
    """Variance (n,) of each batch's change around the line through its neighbours; 0 if there are too few batches."""
    variance = np.zeros(len(change))
    if len(change) > 2:
        variance[1:-1] = np.square(np.diff(change, 2)) / 6
        variance[0], variance[-1] = variance[1], variance[-2]
    return variance


def suggest(curve: pd.DataFrame, classes: int) -> Picks:
    """Points of a curve (`make_curve`) from which a rate can be picked.

    Args:
        curve: of the sweep.
        classes: number of classes.

    Raises:
        UserError: there are fewer than three rates to judge by.
    """
    if len(curve) < 3:
        raise UserError(
            "The learning-rate finder's loss was not finite from the first batches on: lower lr_find.start "
            "(or unfreeze_lr_find.start) in params.yaml."
        )
    rates, smoothed = curve["rate"].to_numpy(), curve["smoothed"].to_numpy()
    lowest = int(smoothed.argmin())
    starting = (curve["loss"] - curve["change"]).to_numpy()
    midpoint = int(np.flatnonzero(smoothed <= max(smoothed[lowest] / 2, smoothed[lowest]))[0])
    limit = divergence_limit(smoothed[lowest], starting, classes)
    divergence = int(np.flatnonzero(smoothed <= limit)[-1])
    # Only on the way down to the lowest loss: past it, the swings of a loss that diverges are steeper than any descent.
    steepest = int(np.gradient(smoothed, np.log(rates))[: lowest + 1].argmin())
    return Picks(*(float(rates[i]) for i in (lowest, midpoint, divergence, steepest, _valley(smoothed))))


def divergence_limit(lowest: float, starting: Floats, classes: int) -> float:
    """Limit of the change of the loss. Above it, the loss is more than `DIVERGED` times that of a uniform prediction.

    If even the curve's lowest loss is higher than that of a uniform prediction, log(classes), the limit is
    (`DIVERGED` - 1) * log(classes) above the lowest. With class weights and label smoothing together, the loss of a
    uniform prediction is higher, as PyTorch applies the weights to the smoothing as well; this is ignored.

    Args:
        lowest: lowest smoothed change of the curve.
        starting: (n,) the starting weights' loss of each batch.
        classes: number of classes.
    """
    uniform = math.log(classes)
    return max(lowest, uniform - float(starting.mean())) + (DIVERGED - 1) * uniform


def pick_rate(picks: Picks, rule: str) -> float:
    """The rate to train with.

    Args:
        picks: points of the curve.
        rule: ``minimum`` (one order of magnitude below the rate of the lowest loss, as in the fast.ai lesson),
            ``divergence`` (two orders of magnitude below that point), ``midpoint``, ``steepest`` or ``valley``.
    """
    return float(getattr(picks, rule)) / {"minimum": 10, "divergence": 100}.get(rule, 1)


def _valley(losses: Floats) -> int:
    """Index two thirds into the longest subsequence of falling losses."""
    n = len(losses)
    lengths = np.ones(n, int)
    before = np.full(n, -1)
    for i in range(1, n):
        falls = np.flatnonzero(losses[:i] > losses[i])
        if len(falls):
            best = falls[lengths[falls].argmax()]
            lengths[i], before[i] = lengths[best] + 1, best
    chain = [int(lengths.argmax())]
    while before[chain[-1]] >= 0:
        chain.append(int(before[chain[-1]]))
    chain.reverse()
    return chain[min(len(chain) - 1, 2 * len(chain) // 3)]
