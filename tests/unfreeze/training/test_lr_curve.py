"""The learning-rate finder's curve: picks on curves with a known answer, smoothing and its standard error."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from unfreeze.errors import UserError
from unfreeze.training.lr_curve import DIVERGED, Picks, divergence_limit, make_curve, pick_rate, suggest

Floats = NDArray[np.float64]
RATES = np.geomspace(1e-5, 10, 100)
DECADES = np.log10(RATES)
STEP = RATES[1] / RATES[0]
CLASSES = 7
UNIFORM = math.log(CLASSES)  # loss of the uniform prediction


def near(rate: float, steps: float = 1.0) -> object:
    """Equal to the decimal logarithm of any rate that is at most ``steps`` steps of the sweep away from ``rate``."""
    return pytest.approx(math.log10(rate), abs=steps * math.log10(STEP) + 1e-9)


def dip(lowest: float = 1e-2, width: float = 1.0, rates: Floats = RATES) -> Floats:
    """A Gaussian dip in the logarithm of the rate; its steepest descent is ``width`` decades from its lowest point."""
    return 1 - 0.6 * np.exp(-0.5 * ((np.log10(rates) - math.log10(lowest)) / width) ** 2)


def points(losses: Floats, starting: Floats | float = 0.0, rates: Floats = RATES) -> Picks:
    """Points of the curve of a sweep with these losses. The default loss of the starting weights is 0."""
    return suggest(make_curve(rates[: len(losses)], losses, np.broadcast_to(starting, np.shape(losses))), CLASSES)


def harmful_from(rate: float) -> Floats:
    """Losses that rise with the square of the rate: flat at first, and 0.1 at this rate."""
    return 0.1 * (RATES / rate) ** 2


def rising_late(losses: Floats) -> Floats:
    """The same losses, but diverging over the last decade."""
    return losses + np.exp(6 * np.maximum(DECADES, 0)) - 1


@pytest.mark.parametrize("iterations", [10, 50, 100])
def test_rates_are_exponential(iterations: int) -> None:
    rates = np.geomspace(1e-6, 1, iterations)
    assert (rates[0], rates[-1], len(rates)) == (pytest.approx(1e-6), pytest.approx(1), iterations)
    np.testing.assert_allclose(rates[1:] / rates[:-1], 1e6 ** (1 / (iterations - 1)))


@pytest.mark.parametrize("lowest", [1e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("shape", [lambda losses: losses, rising_late], ids=["flat end", "diverging"])
def test_minimum_and_steepest_of_a_dip(lowest: float, shape: Callable[[Floats], Floats]) -> None:
    picks = points(shape(dip(lowest, 0.5)))
    assert math.log10(picks.minimum) == near(lowest)
    assert math.log10(picks.steepest) == near(lowest / 10**0.5, 2)
    assert RATES[0] <= picks.valley < picks.minimum


def test_rules() -> None:
    picks = points(dip())
    assert pick_rate(picks, "minimum") == pytest.approx(picks.minimum / 10)
    assert pick_rate(picks, "divergence") == pytest.approx(picks.divergence / 100)
    assert pick_rate(picks, "steepest") == picks.steepest
    assert pick_rate(picks, "midpoint") == picks.midpoint
    assert pick_rate(picks, "valley") == picks.valley


@pytest.mark.parametrize("lowest", [1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("depth", [0.2, 0.6, 3.0])
def test_midpoint_is_half_way_down_a_dip(lowest: float, depth: float) -> None:
    losses = 1 - depth / 0.6 * (1 - dip(lowest))
    half = 10 ** math.sqrt(2 * math.log(2))  # a Gaussian is at half its peak 1.18 standard deviations from it
    assert math.log10(points(losses, 1.0).midpoint) == near(lowest / half)


def test_without_a_descent_the_midpoint_is_the_minimum() -> None:
    picks = points(harmful_from(1e-2) + 0.1)
    assert picks.midpoint == picks.minimum == RATES[0]


def test_valley_is_two_thirds_into_the_longest_descent() -> None:
    at = np.arange(100)
    losses = np.interp(at, [0, 10, 20, 25, 70, 99], [1.0, 0.9, 1.1, 1.1, 0.4, 3.0])
    assert math.log10(points(losses).valley) == near(RATES[25 + 30], 3)
    assert math.log10(points(np.linspace(1, 0.1, 100)).valley) == near(RATES[66])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("iterations", [50, 100])
def test_noise_moves_the_picks_little(seed: int, iterations: int) -> None:
    rates = np.geomspace(1e-5, 10, iterations)
    losses = dip(1e-2, 0.7, rates) + np.random.default_rng(seed).normal(0, 0.04, iterations)
    picks = points(losses, 1.0, rates)
    assert 1e-2 / 4 < picks.minimum < 1e-2 * 4
    assert 10**-2.7 / 8 < picks.steepest < 1e-2
    assert 1e-5 < picks.valley <= 1e-2 * 4
    expected = 1e-2 / 10 ** (0.7 * math.sqrt(2 * math.log(2)))
    assert expected / 2 < picks.midpoint < expected * 2


@pytest.mark.parametrize("at", [0, 5, 20, 40, 80, 99])
def test_a_single_lucky_batch_is_not_the_minimum(at: int) -> None:
    losses = rising_late(dip())
    losses[at] -= 0.5
    assert math.log10(points(losses).minimum) == near(1e-2, 4)


def test_swings_after_the_minimum_are_no_descent() -> None:
    losses = dip(1e-2, 0.7)
    losses[-12:] = [2, 3, 5, 8, 9, 9, 8, 5, 3, 2, 2, 2]
    assert math.log10(points(losses).steepest) == near(10**-2.7, 3)


@pytest.mark.parametrize(
    ("losses", "minimum"),
    [
        pytest.param(np.linspace(1, 0.1, 100), 99, id="falls to the end"),
        pytest.param(np.linspace(0.1, 1, 100), 0, id="rises from the start"),
        pytest.param(dip(1e-5, 1), 0, id="lowest at the start"),
        pytest.param(dip(10, 1), 99, id="lowest at the end"),
    ],
)
def test_ends_of_the_sweep(losses: Floats, minimum: int) -> None:
    picks = points(losses)
    assert picks.minimum == RATES[minimum]
    assert picks.minimum <= picks.divergence
    assert picks.steepest <= picks.minimum
    assert RATES[0] <= picks.valley <= picks.minimum


def test_a_flat_curve_has_picks_in_the_sweep() -> None:
    assert all(RATES[0] <= rate <= RATES[-1] for rate in dataclasses.astuple(points(np.full(100, 0.69))))


@pytest.mark.parametrize("losses", [[], [1.0], [1.0, 0.9]])
def test_too_few_losses_are_told(losses: list[float]) -> None:
    with pytest.raises(UserError, match=r"lower lr_find\.start"):
        points(np.array(losses))


@pytest.mark.parametrize("count", [1, 2, 3, 10, 50, 100, 1000])
def test_smoothing_is_the_gaussian_mean_of_the_change(count: int) -> None:
    losses, starting = np.random.default_rng(0).normal(1, 0.2, (2, count))
    curve = make_curve(np.geomspace(1e-5, 1, count), losses, starting)
    at = np.arange(count)
    weights = np.exp(-0.5 * ((at[:, None] - at) / max(1, count / 30)) ** 2)
    np.testing.assert_allclose(curve["change"], losses - starting)
    np.testing.assert_allclose(curve["smoothed"], weights @ (losses - starting) / weights.sum(1), rtol=1e-5)


def test_smoothing_keeps_what_is_flat_and_does_not_lag() -> None:
    np.testing.assert_allclose(make_curve(RATES, np.full(100, 0.7), np.zeros(100))["smoothed"], 0.7)
    assert make_curve(RATES, dip(), np.zeros(100))["smoothed"].argmin() == dip().argmin()


def test_the_standard_error_is_that_of_repeated_sweeps() -> None:
    rng = np.random.default_rng(0)
    curves = [make_curve(RATES, dip() + rng.normal(0, 0.1, 100), np.zeros(100)) for _ in range(300)]
    found = np.std([curve["smoothed"] for curve in curves], axis=0)
    told = np.sqrt(np.mean([curve["error"] ** 2 for curve in curves], axis=0))
    np.testing.assert_allclose(told, found, rtol=0.15)


def test_what_batches_differ_by_is_no_error() -> None:
    """Some batches are hard and some are easy, for the starting weights too."""
    hard = np.random.default_rng(0).lognormal(-1, 1, 100)
    curve = make_curve(RATES, dip() + hard, 1 + hard)
    np.testing.assert_allclose(curve["smoothed"], make_curve(RATES, dip(), np.ones(100))["smoothed"])
    assert curve["error"].max() < 0.01


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("harm", [1e-3, 1e-2, 1e-1])
def test_divergence_is_where_the_loss_exceeds_that_of_a_uniform_prediction(seed: int, harm: float) -> None:
    """The network is already trained: it cannot improve, and its curve's lowest point is random. The noise
    between batches grows with the rate, as measured on photographs of waste."""
    noise = np.random.default_rng(seed).normal(0, 0.1 * (RATES / harm) ** 0.8)
    losses = harmful_from(harm) + noise
    exceeded = RATES[np.argmax(harmful_from(harm) > DIVERGED * UNIFORM)]
    upto = np.argmax(harmful_from(harm) > DIVERGED * UNIFORM + 0.2)
    assert exceeded / 1.4 < points(losses[:upto]).divergence < exceeded * 1.4


@pytest.mark.parametrize(("classes", "limit"), [(2, 1.04), (10, 3.454), (1000, 10.36)])
def test_the_loss_may_be_higher_with_more_classes(classes: int, limit: float) -> None:
    assert divergence_limit(0.0, np.array([0.2, 0.4]), classes) == pytest.approx(limit - 0.3, abs=0.01)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("height", [-0.3, 0.0, 0.3])
def test_a_plateau_near_the_loss_of_a_uniform_prediction_is_no_divergence(seed: int, height: float) -> None:
    """At rates from 1e-3 on, the network gives nearly the same prediction for all images; at 0.1 its loss rises."""
    expected = (UNIFORM + height) / (1 + (1e-3 / RATES) ** 2) + (RATES / 0.1) ** 3
    losses = expected + np.random.default_rng(seed).normal(0, 0.2 * (RATES > 5e-4))
    exceeded = RATES[np.argmax(expected > DIVERGED * UNIFORM)]
    upto = np.argmax(losses > DIVERGED * UNIFORM + 1)
    assert exceeded / 1.4 < points(losses[:upto]).divergence < exceeded * 1.4


def test_a_network_worse_than_a_uniform_prediction_diverges_when_its_own_loss_rises() -> None:
    picks = points(UNIFORM + 1 + harmful_from(1e-2)[:80], UNIFORM + 1)
    assert math.log10(picks.divergence) == near(1e-2 * ((DIVERGED - 1) * UNIFORM / 0.1) ** 0.5, 2)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("typical", [0.001, 0.01, 0.03])
def test_where_next_to_nothing_is_lost_an_unlucky_batch_does_not_make_the_pick(seed: int, typical: float) -> None:
    """Losses of a good network are small, and sometimes twenty times as large. The loss diverges at the rate 0.3."""
    rng = np.random.default_rng(seed)
    starting = typical * np.exp(1.2 * rng.normal(size=100))
    starting[rng.integers(4)] = max(20 * typical, 0.1)
    losses = starting * rng.lognormal(0, np.minimum(1, RATES / 0.1)) + (RATES / 0.3) ** 2 * DIVERGED * UNIFORM
    upto = np.argmax(losses > DIVERGED * UNIFORM + 0.2)
    assert 0.3 / 2 < points(losses[:upto], starting[:upto]).divergence < 0.3 * 2
