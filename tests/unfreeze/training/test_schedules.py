"""Schedules, compared with torch's schedulers, stepped per batch."""

import itertools

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from unfreeze.training.loop import set_rate
from unfreeze.training.schedules import make_schedule

CYCLES = list(itertools.product((1, 2, 4), (1, 2, 3), (1, 2, 3), (1, 7)))
"""Combinations of cycles, cycle_len, cycle_mult and batches per epoch."""


def optimizer(*rates: float) -> torch.optim.Optimizer:
    """An optimizer with one parameter group for each rate."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, lr=1.0)


def run(scheduler: lr_scheduler.LRScheduler, iterations: int) -> np.ndarray:
    """Rates of all groups at all iterations, (iterations, groups)."""
    rates = []
    for _ in range(iterations):
        rates.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return np.array(rates)


@pytest.mark.parametrize(("cycles", "cycle_len", "cycle_mult", "batches"), CYCLES)
def test_sgdr_is_torchs_per_batch_and_group(cycles: int, cycle_len: int, cycle_mult: int, batches: int) -> None:
    schedule = make_schedule("sgdr", cycles, cycle_len, cycle_mult, batches)
    top, scales = 0.3, (1 / 9, 1 / 3, 1.0)

    theirs = lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer(*(top * scale for scale in scales)), cycle_len * batches, cycle_mult, eta_min=0.0
    )
    ours = optimizer(*scales)
    for group, scale in zip(ours.param_groups, scales, strict=True):
        group["lr_scale"] = scale
    rates = []
    for factor in schedule.factors:
        set_rate(ours, top * float(factor))
        rates.append([group["lr"] for group in ours.param_groups])
    np.testing.assert_allclose(rates, run(theirs, len(schedule.factors)), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["sgdr", "one_cycle", "step", "constant"])
@pytest.mark.parametrize(("cycles", "cycle_len", "cycle_mult", "batches"), CYCLES)
def test_totals(name: str, cycles: int, cycle_len: int, cycle_mult: int, batches: int) -> None:
    schedule = make_schedule(name, cycles, cycle_len, cycle_mult, batches)
    ends, length = [0], cycle_len
    for _ in range(cycles):
        ends.append(ends[-1] + length)
        length *= cycle_mult
    assert schedule.cycle_ends == tuple(ends[1:])
    assert schedule.epochs == ends[-1]
    assert schedule.factors.shape == (ends[-1] * batches,)
    assert schedule.factors.min() > 0 and schedule.factors.max() <= 1
    for first, end in itertools.pairwise(ends):  # every cycle repeats the shape
        alone = make_schedule(name, 1, end - first, 1, batches)
        np.testing.assert_array_equal(schedule.factors[first * batches : end * batches], alone.factors)


@pytest.mark.parametrize("warmup", [0.1, 0.3, 0.9])
@pytest.mark.parametrize("batches", [1, 7, 50])
def test_a_warm_up_rises_to_the_top_in_its_share_of_every_cycle(warmup: float, batches: int) -> None:
    schedule = make_schedule("sgdr", 2, 2, 2, batches, warmup)
    plain = make_schedule("sgdr", 2, 2, 2, batches)
    assert schedule.cycle_ends == plain.cycle_ends and len(schedule.factors) == len(plain.factors) == 6 * batches
    for cycle in np.split(schedule.factors, [2 * batches]):
        top = int(cycle.argmax())
        assert top == int(warmup * len(cycle)) and cycle[top] == 1
        assert (np.diff(cycle[: top + 1]) > 0).all() and (np.diff(cycle[top:]) < 0).all()
        assert cycle.min() > 0


def test_the_lessons_example_has_seven_epochs() -> None:
    assert make_schedule("sgdr", 3, 1, 2, 100).cycle_ends == (1, 3, 7)


def test_sgdr_restarts_at_the_top_and_ends_near_zero() -> None:
    schedule = make_schedule("sgdr", 3, 1, 2, 50)
    starts = [0, 50, 150]
    np.testing.assert_array_equal(schedule.factors[starts], 1)
    assert (schedule.factors[[49, 149, 349]] < 2e-3).all()
    falls = np.diff(schedule.factors) < 0
    assert falls.sum() == len(falls) - 2  # all but the two restarts


@pytest.mark.parametrize("iterations", [*range(2, 13), 100, 333])
def test_one_cycle_is_torchs(iterations: int) -> None:
    theirs = lr_scheduler.OneCycleLR(optimizer(0.2), 0.2, total_steps=iterations, cycle_momentum=False)
    rates = [theirs.optimizer.param_groups[0]["lr"]]
    for _ in range(iterations - 1):
        theirs.optimizer.step()
        theirs.step()
        rates.append(theirs.optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(0.2 * make_schedule("one_cycle", 1, 1, 1, iterations).factors, rates, rtol=1e-9)


def test_one_cycle_of_one_iteration_trains() -> None:
    assert make_schedule("one_cycle", 2, 1, 1, 1).factors.tolist() == [1, 1]


@pytest.mark.parametrize("thirds", [1, 2, 50])
def test_step_is_torchs(thirds: int) -> None:
    theirs = run(lr_scheduler.StepLR(optimizer(1.0), thirds, 0.1), 3 * thirds)[:, 0]
    np.testing.assert_allclose(make_schedule("step", 1, 3, 1, thirds).factors, theirs, rtol=1e-12)


def test_step_in_epochs_that_do_not_divide_by_three() -> None:
    factors = make_schedule("step", 1, 1, 1, 100).factors
    np.testing.assert_array_equal(np.unique(factors, return_counts=True)[1], [33, 33, 34])
    assert (np.diff(factors) <= 0).all()


def test_constant_is_the_top_rate() -> None:
    assert (make_schedule("constant", 2, 3, 2, 5).factors == 1).all()
