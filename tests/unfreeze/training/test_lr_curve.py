"""The learning-rate finder: picks on curves with a known answer, and a sweep that restores all state."""

import copy
import dataclasses
import math
import random
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from tests.devices import DEVICES
from unfreeze.errors import UserError
from unfreeze.training.loop import set_rate
from unfreeze.training.lr_curve import DIVERGED, Picks, make_curve, pick_rate, suggest
from unfreeze.training.range_test import Losses, lr_find
from unfreeze.training.state import restored

Floats = NDArray[np.float64]
RATES = np.geomspace(1e-5, 10, 100)
DECADES = np.log10(RATES)
STEP = RATES[1] / RATES[0]
CHANCE = 2.0  # loss of a prediction that is the same for every image


def near(rate: float, steps: float = 1.0) -> object:
    """Equal to the decimal logarithm of any rate that is at most ``steps`` steps of the sweep away from ``rate``."""
    return pytest.approx(math.log10(rate), abs=steps * math.log10(STEP) + 1e-9)


def dip(lowest: float = 1e-2, width: float = 1.0, rates: Floats = RATES) -> Floats:
    """A Gaussian dip in the logarithm of the rate; its steepest descent is ``width`` decades from its lowest point."""
    return 1 - 0.6 * np.exp(-0.5 * ((np.log10(rates) - math.log10(lowest)) / width) ** 2)


def points(losses: Floats, starting: Floats | float = 0.0, rates: Floats = RATES) -> Picks:
    """Points of the curve of a sweep with these losses. The default loss of the starting weights is 0."""
    return suggest(make_curve(rates[: len(losses)], losses, np.broadcast_to(starting, np.shape(losses))), CHANCE)


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
    assert pick_rate(picks, "valley") == picks.valley


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
    picks = points(losses, rates=rates)
    assert 1e-2 / 4 < picks.minimum < 1e-2 * 4
    assert 10**-2.7 / 8 < picks.steepest < 1e-2
    assert 1e-5 < picks.valley <= 1e-2 * 4


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
def test_divergence_is_where_the_loss_exceeds_that_of_a_constant_prediction(seed: int, harm: float) -> None:
    """The network is already trained: it cannot improve, and its curve's lowest point is random. The noise
    between batches grows with the rate, as measured on photographs of waste."""
    noise = np.random.default_rng(seed).normal(0, 0.1 * (RATES / harm) ** 0.8)
    losses = harmful_from(harm) + noise
    exceeded = RATES[np.argmax(harmful_from(harm) > CHANCE + DIVERGED)]
    assert (
        exceeded / 1.4
        < points(losses[: np.argmax(harmful_from(harm) > CHANCE + DIVERGED + 0.2)]).divergence
        < exceeded * 1.4
    )


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("height", [-0.3, 0.0, 0.3])
def test_a_plateau_near_the_loss_of_a_constant_prediction_is_no_divergence(seed: int, height: float) -> None:
    """At rates from 1e-3 on, the network gives nearly the same prediction for all images; at 0.1 its loss rises."""
    plateau = (CHANCE + height) / (1 + (1e-3 / RATES) ** 2)
    losses = plateau + (RATES / 0.1) ** 3 + np.random.default_rng(seed).normal(0, 0.2 * (RATES > 5e-4))
    exceeded = RATES[np.argmax(plateau + (RATES / 0.1) ** 3 > CHANCE + DIVERGED)]
    assert exceeded / 1.4 < points(losses[: np.argmax(losses > CHANCE + DIVERGED + 1)]).divergence < exceeded * 1.4


def test_a_network_worse_than_a_constant_prediction_diverges_when_its_own_loss_rises() -> None:
    picks = points(CHANCE + 1 + harmful_from(1e-2)[:80], CHANCE + 1)
    assert math.log10(picks.divergence) == near(1e-2 * (DIVERGED / 0.1) ** 0.5, 2)


def test_sweep_trains_once_at_every_rate() -> None:
    given: list[float] = []

    def train_at(rate: float) -> Losses:
        given.append(rate)
        return float(dip()[len(given) - 1]), 1.0

    curve = lr_find(train_at, 1e-5, 10, 100, CHANCE)
    np.testing.assert_allclose(given, RATES)
    pd.testing.assert_frame_equal(curve, make_curve(RATES, dip(), np.ones(100)))


def sweep(losses: Floats) -> int:
    """Number of batches that a sweep with these losses takes."""
    line = iter(losses)
    return len(lr_find(lambda rate: (float(next(line)), 0.5), 1e-5, 10, len(losses), CHANCE))


@pytest.mark.parametrize("bad", [math.nan, 50.0])
@pytest.mark.parametrize("before", [0, 1, 30, 59, 60, 61])
def test_sweep_goes_on_after_the_losses_that_are_there(before: int, bad: float) -> None:
    losses = [(0.5, 0.4), (0.4, 0.5)] * 30 + [(bad, 0.5)] * 2 + [(0.5, 0.5)] * 38
    line = iter(losses[before:])
    given: list[float] = []

    def train_at(rate: float) -> Losses:
        given.append(rate)
        return next(line)

    found = lr_find(train_at, 1e-5, 10, 100, CHANCE, losses[:before])
    line = iter(losses)
    pd.testing.assert_frame_equal(found, lr_find(lambda rate: next(line), 1e-5, 10, 100, CHANCE))
    assert given == RATES[before : 61 if math.isnan(bad) else 62].tolist()  # one bad batch may be chance


def test_sweep_stops_when_the_loss_exceeds_that_of_a_constant_prediction() -> None:
    taken = sweep(np.concatenate([np.full(60, 0.5), 0.5 + 0.1 * np.arange(40)]))
    assert 85 <= taken < 90


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_sweep_stops_at_a_loss_that_is_no_number(bad: float) -> None:
    assert sweep(np.array([0.5] * 30 + [bad] + [0.5] * 69)) == 30


def test_sweep_goes_on_through_noise() -> None:
    assert sweep(np.array([0.5, 1.9] * 50)) == 100


def test_one_batch_of_three_images_does_not_end_a_sweep() -> None:
    """One of the images has the wrong label."""
    assert sweep(np.array([0.01] * 4 + [5.0] + [0.01] * 45 + [7.0] + [0.01] * 49)) == 100


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("typical", [0.001, 0.01, 0.03])
def test_where_next_to_nothing_is_lost_an_unlucky_batch_does_not_make_the_pick(seed: int, typical: float) -> None:
    """Losses of a good network are small, and sometimes twenty times as large. The loss diverges at the rate 0.3."""
    rng = np.random.default_rng(seed)
    starting = typical * np.exp(1.2 * rng.normal(size=100))
    starting[rng.integers(4)] = max(20 * typical, 0.1)
    losses = starting * rng.lognormal(0, np.minimum(1, RATES / 0.1)) + (RATES / 0.3) ** 2 * (CHANCE + DIVERGED)
    upto = np.argmax(losses > CHANCE + DIVERGED + 0.2)
    assert 0.3 / 2 < points(losses[:upto], starting[:upto]).divergence < 0.3 * 2


@pytest.mark.parametrize("seed", range(5))
def test_sweep_of_a_good_network_does_not_take_a_single_mistake_for_divergence(seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert sweep(np.where(rng.random(100) < 0.1, 0.4, 0.001) * rng.uniform(0.5, 1.5, 100)) == 100


@pytest.mark.parametrize(
    "losses", [[math.nan], [0.7, math.inf], [0.7, 3, 50, 900], [0.7, 0.6, 0.7, 0.8, 1, 2, 9, 50, 50]]
)
def test_a_sweep_that_diverges_at_once_is_told(losses: list[float]) -> None:
    line = iter(losses)
    with pytest.raises(UserError, match=r"diverged at once.*lower lr_find\.start \(or unfreeze_lr_find\.start\)"):
        lr_find(lambda rate: (next(line), 0.7), 1e-2, 10, 100, 0.7)


class Net(nn.Module):
    """A network with BatchNorm, dropout, and a buffer that is not saved with the weights."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
        self.register_buffer("calls", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layers(x)


def training(device: torch.device | str = "cpu") -> tuple[Net, torch.optim.Optimizer, Callable[[], float]]:
    """A model in the middle of its training: Adam has moments, one module is in eval mode, one bias is frozen."""
    torch.manual_seed(3)
    model = Net().to(device)
    model.layers[0].bias.requires_grad_(False)
    groups = [
        {"params": [p for p in model.layers[0].parameters() if p.requires_grad], "lr_scale": 0.1},
        {"params": [*model.layers[1].parameters(), *model.layers[4].parameters()], "lr_scale": 1.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)

    def train_batch() -> float:
        x, y = torch.randn(32, 6, device=device), torch.randint(0, 3, (32,), device=device)
        loss = nn.functional.cross_entropy(model(x), y) * (1 + 0.001 * random.random() * np.random.rand())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    model.train()
    for _ in range(3):
        train_batch()
    model.layers[3].eval()
    return model, optimizer, train_batch


def at_a_rate(optimizer: torch.optim.Optimizer, train_batch: Callable[[], float]) -> Callable[[float], Losses]:
    """Function that trains on the next batch at a given rate."""

    def train_at(rate: float) -> Losses:
        set_rate(optimizer, rate)
        return train_batch(), 1.0

    return train_at


def everything(model: Net, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """All state that is restored after a sweep; rates and gradients are set by the next batch."""
    return copy.deepcopy(
        {
            "tensors": dict(model.named_parameters()) | dict(model.named_buffers()),
            "optimizer": optimizer.state_dict()["state"],
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }
    )


def same(a: object, b: object) -> bool:
    """Whether two values are equal bit for bit, including nested containers."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return bool((a == b).all())
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@DEVICES
def test_a_sweep_leaves_no_trace(device: torch.device) -> None:
    model, optimizer, train_batch = training(device)
    before = everything(model, optimizer)
    with restored(model, optimizer):
        curve = lr_find(at_a_rate(optimizer, train_batch), 1e-5, 1, 30, CHANCE)
        during = everything(model, optimizer)
    assert len(curve) > 10
    assert same(everything(model, optimizer), before)
    changed = {"tensors", "optimizer", "python", "numpy", "cuda" if device.type == "cuda" else "torch"}
    assert all(not same(during[part], before[part]) for part in changed)  # there was something to restore


@DEVICES
def test_training_goes_on_as_if_there_had_been_no_sweep(device: torch.device) -> None:
    def losses(sweeps: bool) -> list[float]:
        random.seed(1)
        np.random.seed(1)
        model, optimizer, train_batch = training(device)
        if sweeps:
            with restored(model, optimizer):
                lr_find(at_a_rate(optimizer, train_batch), 1e-5, 1, 20, CHANCE)
        set_rate(optimizer, 0.1)
        return [train_batch() for _ in range(5)]

    assert losses(sweeps=True) == losses(sweeps=False)


def test_weights_come_back_after_an_error() -> None:
    model, optimizer, train_batch = training()
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match="half-way"), restored(model, optimizer):
        train_batch()
        raise RuntimeError("half-way")
    assert same(everything(model, optimizer), before)


def test_an_optimizer_that_never_stepped_has_a_state_of_zeros() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with restored(model, optimizer):
        model(torch.randn(4, 6)).sum().backward()
        optimizer.step()
    assert not any(state["momentum_buffer"].any() for state in optimizer.state_dict()["state"].values())


def test_groups_keep_their_share_of_the_rate() -> None:
    model, optimizer, _ = training()
    seen = []

    def train_batch() -> float:
        seen.append([group["lr"] for group in optimizer.param_groups])
        return 1.0

    lr_find(at_a_rate(optimizer, train_batch), 1e-4, 1, 10, CHANCE)
    np.testing.assert_allclose(seen, np.outer(np.geomspace(1e-4, 1, 10), [0.1, 1.0]))
