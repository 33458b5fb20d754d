"""The learning-rate finder's curve: smooth the loss at each rate, and pick a rate from it.

The LR range test is Smith's (Cyclical Learning Rates for Training Neural Networks, 2017); picking one order of
magnitude below the rate of the lowest loss is the fast.ai lesson's rule (2017).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unfreeze.errors import UserError

DIVERGED = 4.0
"""A running mean of the loss so many times its lowest ends the sweep."""

SMALL = 0.1
"""Between losses below this only chance makes a difference: a good network's single mistake is no divergence."""

SOLVED = 0.01
"""A loss at which every image of the sweep is told with 99 %: the rates that come after find nothing left to lower."""

FLAT = 30.0
"""How far below the rate that breaks a network its lowest loss is taken to lie where the curve is flat up to there.

A network that is nearly trained has nothing to gain in a sweep: where on the flat the lowest value lies is chance, and
moved the pick a hundredfold from seed to seed, while over 100 batches the rate that breaks it moved by a half. Of three
rates the one near a tenth of the stand-in trained best (benchmarks/notes/choices.md)."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Picks:
    """Points of a loss curve, as learning rates.

    Attributes:
        minimum: highest rate whose smoothed loss cannot be told from the lowest; where the loss comes down to nothing, the
            rate at which it does (`SOLVED`); on a curve that does not fall, or begins at next to nothing (`SMALL`), a rate
            that far below the one that breaks the network (`FLAT`).
        steepest: rate at which the smoothed loss falls fastest, on the way to its minimum.
        valley: rate two thirds into the longest sequence of ever lower smoothed losses.
    """

    minimum: float
    steepest: float
    valley: float


def smooth(losses: Floats) -> Floats:
    """Mean of each loss and its neighbours, weighted by a Gaussian of a thirtieth of the curve, (iterations,).

    Unlike a running mean it does not lag behind, which over a sweep of few batches would move the minimum by as much as
    the order of magnitude that the pick is about.
    """
    if not len(losses):
        return np.zeros(0)
    width = _width(len(losses))
    reach = math.ceil(5 * width)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    inside = slice(reach, reach + len(losses))
    return np.convolve(losses, weights)[inside] / np.convolve(np.ones(len(losses)), weights)[inside]


def suggest(rates: Floats, losses: Floats) -> Picks:
    """Points of a loss curve that a rate can be picked by; batches whose loss is not finite do not count.

    Args:
        rates: (n,) rising learning rates.
        losses: (n,) loss of the batch at each.

    Raises:
        UserError: there are fewer than three finite losses to judge by.
    """
    finite = np.isfinite(losses)
    rates, losses = np.asarray(rates, float)[finite], np.asarray(losses, float)[finite]
    if len(rates) < 3:
        raise UserError(
            "The learning-rate finder's loss was not finite from the first batches on: lower lr_find.start "
            "(or unfreeze_lr_find.start) in params.yaml."
        )
    smoothed = smooth(losses)
    lowest = int(smoothed.argmin())
    noise, solved = _batch_noise(losses), np.flatnonzero(smoothed < SOLVED)
    is_flat = smoothed[0] - smoothed[lowest] < 2 * noise and noise > 0.01 * smoothed[lowest]
    # Not the smoothed loss: one unlucky batch among the first would make a descent of the flat.
    begins = float(np.median(losses[: max(3, len(losses) // 5)]))
    if is_flat or begins < SMALL:
        minimum = float(rates[np.flatnonzero(smoothed <= DIVERGED * max(smoothed[lowest], SMALL))[-1]] / FLAT)
    elif len(solved):
        minimum = float(rates[solved[0]])
    else:
        minimum = float(rates[_last_of_the_lowest(losses, smoothed)])
    # Only on the way down to the lowest loss: past it, the swings of a loss that diverges are steeper than any descent.
    steepest = int(np.gradient(smoothed, np.log(rates))[: lowest + 1].argmin())
    falling = smoothed[: solved[0] + 1] if len(solved) and solved[0] > 1 else smoothed
    return Picks(minimum, float(rates[steepest]), float(rates[_valley(falling)]))


def _last_of_the_lowest(losses: Floats, smoothed: Floats) -> int:
    """Index of the highest rate whose smoothed loss cannot be told from the lowest.

    The noise is that of a batch's loss, less for as many batches as are averaged.
    """
    lowest = int(smoothed.argmin())
    averaged = 2 * np.sqrt(np.pi) * _width(len(losses))
    noise = _batch_noise(losses, lowest + 1) / np.sqrt(averaged)
    return int(np.flatnonzero(smoothed <= smoothed[lowest] + 2 * noise)[-1])


def _batch_noise(losses: Floats, upto: int = 0) -> float:
    """Standard deviation of a batch's loss around its neighbours', in the sweep's first half or up to an index after it."""
    jumps = np.abs(np.diff(losses, 2)[: max(upto, len(losses) // 2)])
    return 1.4826 * float(np.median(jumps)) / np.sqrt(6)  # of a normal deviate, from its median


def _width(batches: int) -> float:
    """Standard deviation in batches of the Gaussian that a curve is smoothed with."""
    return max(1.0, batches / 30)


def pick_rate(picks: Picks, rule: str) -> float:
    """The rate to train with.

    Args:
        picks: points of the curve.
        rule: ``minimum`` (one order of magnitude below the lowest loss), ``steepest`` or ``valley``.
    """
    return picks.minimum / 10 if rule == "minimum" else float(getattr(picks, rule))


def _valley(losses: Floats) -> int:
    """Index two thirds into the longest subsequence of falling losses, after fastai's rule of that name."""
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
