"""Learning-rate schedules, as data: a factor on the top rate for every iteration.

A schedule is computed before training starts, so it can be plotted, tested and resumed at any iteration.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

Factors = NDArray[np.float64]


@dataclass(frozen=True)
class Schedule:
    """The learning rate of a training, and its cycles.

    Attributes:
        factors: (iterations,) factor on the top rate.
        cycle_ends: number of epochs after which each cycle ends.
    """

    factors: Factors
    cycle_ends: tuple[int, ...]

    @property
    def epochs(self) -> int:
        """Epochs in all cycles."""
        return self.cycle_ends[-1]


def cosine(iterations: int, warmup: float = 0.0) -> Factors:
    """Cosine annealing from 1 towards 0, which the iteration after the last would reach.

    Args:
        iterations: how many.
        warmup: share of the iterations in which the factor first rises to 1, also along half a cosine.
    """
    rise = int(warmup * iterations)
    fall = iterations - rise
    up = (1 - np.cos(np.pi * np.arange(1, rise + 1) / (rise + 1))) / 2
    return np.concatenate([up, (1 + np.cos(np.pi * np.arange(fall) / fall)) / 2])


def one_cycle(iterations: int) -> Factors:
    """The one-cycle policy: a cosine from 1/25 up to 1 in the first 30 %, and down to 1/250,000 (Smith, 2018).

    The constants are those of `torch.optim.lr_scheduler.OneCycleLR`; momentum stays as it is.
    """
    if iterations == 1:  # torch would return the lowest rate
        return np.ones(1)
    low, floor = 1 / 25, 1 / 25 / 1e4
    peak = 0.3 * iterations - 1
    at = np.arange(iterations)
    up = low + (1 - low) * (1 - np.cos(np.pi * at / max(peak, 1e-9))) / 2
    down = 1 + (floor - 1) * (1 - np.cos(np.pi * (at - peak) / max(iterations - 1 - peak, 1e-9))) / 2
    return np.where(at <= peak, up, down)


def step(iterations: int) -> Factors:
    """Step-wise annealing: a tenth of the rate after each third of the iterations."""
    return np.array([1.0, 0.1, 0.01])[np.arange(iterations) * 3 // iterations]


def constant(iterations: int) -> Factors:
    """The top rate throughout."""
    return np.ones(iterations)


SHAPES: dict[str, Callable[[int], Factors]] = {
    "sgdr": cosine,
    "one_cycle": one_cycle,
    "step": step,
    "constant": constant,
}


def make_schedule(
    name: str, cycles: int, cycle_len: int, cycle_mult: int, batches_per_epoch: int, warmup: float = 0.0
) -> Schedule:
    """A schedule of cycles, each with the shape ``name`` and the same top rate.

    With ``sgdr`` this is stochastic gradient descent with warm restarts (Loshchilov and Hutter, 2017): cosine annealing
    per batch. With a warm-up, each cycle has the shape of the one-cycle policy.

    Args:
        name: sgdr, one_cycle, step or constant.
        cycles: number of cycles.
        cycle_len: epochs of the first cycle.
        cycle_mult: length of each next cycle, as a multiple of the one before.
        batches_per_epoch: iterations in an epoch.
        warmup: share of each cycle in which the rate rises to its top; only for ``sgdr``.
    """
    lengths = [cycle_len * cycle_mult**i for i in range(cycles)]
    shape = partial(cosine, warmup=warmup) if name == "sgdr" else SHAPES[name]
    factors = np.concatenate([shape(length * batches_per_epoch) for length in lengths])
    return Schedule(factors, tuple(itertools.accumulate(lengths)))
