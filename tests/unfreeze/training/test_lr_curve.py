"""The learning-rate finder: picks on curves whose answer is known, and a sweep that leaves no trace."""

import copy
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
from unfreeze.training.lr_curve import pick_rate, smooth, suggest
from unfreeze.training.range_test import exponential_rates, lr_find
from unfreeze.training.state import preserved

Floats = NDArray[np.float64]
RATES = exponential_rates(1e-5, 10, 100)
DECADES = np.log10(RATES)
STEP = RATES[1] / RATES[0]


def near(rate: float, steps: float = 1.0) -> object:
    """This rate, give or take so many steps of the sweep, in the logarithm."""
    return pytest.approx(math.log10(rate), abs=steps * math.log10(STEP) + 1e-9)


def dip(lowest: float = 1e-2, width: float = 1.0, rates: Floats = RATES) -> Floats:
    """A Gaussian dip in the logarithm of the rate, ``width`` decades from its lowest point to its steepest descent."""
    return 1 - 0.6 * np.exp(-0.5 * ((np.log10(rates) - math.log10(lowest)) / width) ** 2)


def rising_late(losses: Floats) -> Floats:
    """The same, diverging over the last decade."""
    return losses + np.exp(6 * np.maximum(DECADES, 0)) - 1


@pytest.mark.parametrize("iterations", [10, 50, 100])
def test_rates_are_exponential(iterations: int) -> None:
    rates = exponential_rates(1e-6, 1, iterations)
    assert (rates[0], rates[-1], len(rates)) == (pytest.approx(1e-6), pytest.approx(1), iterations)
    np.testing.assert_allclose(rates[1:] / rates[:-1], 1e6 ** (1 / (iterations - 1)))


@pytest.mark.parametrize("lowest", [1e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("shape", [lambda losses: losses, rising_late], ids=["flat end", "diverging"])
def test_minimum_and_steepest_of_a_dip(lowest: float, shape: Callable[[Floats], Floats]) -> None:
    picks = suggest(RATES, shape(dip(lowest, 0.5)))
    assert math.log10(picks.minimum) == near(lowest)
    assert math.log10(picks.steepest) == near(lowest / 10**0.5, 2)
    assert RATES[0] <= picks.valley < picks.minimum


def test_valley_is_on_the_way_down_to_nothing() -> None:
    """Where every class is told apart at 1e-3, the loss may go on falling to the end of the sweep."""
    losses = 0.7 * 10 ** (-0.92 * (DECADES + 5))
    solved = RATES[np.flatnonzero(losses < 0.01)[0]]
    assert 5e-4 < solved < 2e-3
    assert 1e-5 < suggest(RATES, losses).valley < solved / 2


def test_rules() -> None:
    picks = suggest(RATES, dip())
    assert pick_rate(picks, "minimum") == pytest.approx(picks.minimum / 10)
    assert pick_rate(picks, "steepest") == picks.steepest
    assert pick_rate(picks, "valley") == picks.valley


def test_valley_is_two_thirds_into_the_longest_descent() -> None:
    at = np.arange(100)
    losses = np.interp(at, [0, 10, 20, 25, 70, 99], [1.0, 0.9, 1.1, 1.1, 0.4, 3.0])
    assert math.log10(suggest(RATES, losses).valley) == near(RATES[25 + 30], 3)
    assert math.log10(suggest(RATES, np.linspace(1, 0.1, 100)).valley) == near(RATES[66])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("iterations", [50, 100])
def test_noise_moves_the_picks_little(seed: int, iterations: int) -> None:
    rates = exponential_rates(1e-5, 10, iterations)
    losses = dip(1e-2, 0.7, rates) + np.random.default_rng(seed).normal(0, 0.04, iterations)
    picks = suggest(rates, losses)
    assert 1e-2 / 4 < picks.minimum < 1e-2 * 4
    assert 10**-2.7 / 8 < picks.steepest < 1e-2
    assert 1e-5 < picks.valley <= 1e-2 * 4


@pytest.mark.parametrize("at", [0, 5, 20, 40, 80, 99])
def test_a_single_lucky_batch_is_not_the_minimum(at: int) -> None:
    losses = rising_late(dip())
    losses[at] -= 0.5
    assert math.log10(suggest(RATES, losses).minimum) == near(1e-2, 4)


def test_swings_after_the_minimum_are_no_descent() -> None:
    losses = dip(1e-2, 0.7)
    losses[-12:] = [2, 3, 5, 8, 9, 9, 8, 5, 3, 2, 2, 2]
    assert math.log10(suggest(RATES, losses).steepest) == near(10**-2.7, 3)


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
    picks = suggest(RATES, losses)
    assert picks.minimum == RATES[minimum]
    assert picks.steepest <= picks.minimum
    assert RATES[0] <= picks.valley <= picks.minimum


@pytest.mark.parametrize("after", ["nothing", "mistakes"])
@pytest.mark.parametrize("solved", [3e-3, 1e-2, 1e-1])
def test_a_loss_that_comes_down_to_nothing_is_lowest_where_it_does(solved: float, after: str) -> None:
    """A few images that are easily told apart: nothing breaks a head that has solved them, up to the sweep's end."""
    losses = 0.8 / (1 + (RATES / (solved / 10)) ** 2)  # 0.008 there
    losses[np.searchsorted(RATES, solved * 3) :] = 0
    if after == "mistakes":
        losses[np.searchsorted(RATES, solved * 6)] = 3.0
    assert math.log10(suggest(RATES, losses).minimum) == near(solved, 4)


def test_a_flat_curve_has_picks_in_the_sweep() -> None:
    picks = suggest(RATES, np.full(100, 0.69))
    assert all(RATES[0] <= rate <= RATES[-1] for rate in (picks.minimum, picks.steepest, picks.valley))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_no_number_do_not_count(bad: float) -> None:
    losses = dip()
    losses[[3, 50, 98, 99]] = bad
    assert math.log10(suggest(RATES, losses).minimum) == near(1e-2)


@pytest.mark.parametrize("losses", [[], [1.0], [1.0, 0.9], [1.0, math.nan, 0.9, math.inf]])
def test_too_few_losses_are_told(losses: list[float]) -> None:
    with pytest.raises(UserError, match=r"lower lr_find\.start"):
        suggest(RATES[: len(losses)], np.array(losses))


@pytest.mark.parametrize("count", [1, 2, 3, 10, 50, 100, 1000])
def test_smoothing_is_the_gaussian_mean(count: int) -> None:
    losses = np.random.default_rng(0).normal(1, 0.2, count)
    at = np.arange(count)
    weights = np.exp(-0.5 * ((at[:, None] - at) / max(1, count / 30)) ** 2)
    np.testing.assert_allclose(smooth(losses), weights @ losses / weights.sum(1), rtol=1e-5)


def test_smoothing_keeps_what_is_flat_and_does_not_lag() -> None:
    np.testing.assert_allclose(smooth(np.full(40, 0.7)), 0.7)
    assert smooth(dip()).argmin() == dip().argmin()
    assert len(smooth(np.zeros(0))) == 0
    assert smooth(np.ones(10_000)).shape == (10_000,)


def test_sweep_trains_once_at_every_rate() -> None:
    given: list[float] = []

    def train_at(rate: float) -> float:
        given.append(rate)
        return float(dip()[len(given) - 1])

    curve = lr_find(train_at, 1e-5, 10, 100)
    np.testing.assert_allclose(given, RATES)
    np.testing.assert_allclose(curve["rate"], RATES)
    np.testing.assert_allclose(curve["loss"], dip())
    np.testing.assert_allclose(curve["smoothed"], smooth(dip()))


def sweep(losses: Floats) -> int:
    """Batches that a sweep with these losses takes."""
    line = iter(losses)
    return len(lr_find(lambda rate: float(next(line)), 1e-5, 10, len(losses)))


@pytest.mark.parametrize("bad", [math.nan, 50.0])
@pytest.mark.parametrize("before", [0, 1, 30, 59, 60, 61])
def test_sweep_goes_on_after_the_losses_that_are_there(before: int, bad: float) -> None:
    losses = [0.5, 0.4] * 30 + [bad, bad] + [0.5] * 38
    line = iter(losses[before:])
    given: list[float] = []

    def train_at(rate: float) -> float:
        given.append(rate)
        return next(line)

    found = lr_find(train_at, 1e-5, 10, 100, losses[:before])
    line = iter(losses)
    pd.testing.assert_frame_equal(found, lr_find(lambda rate: next(line), 1e-5, 10, 100))
    assert given == RATES[before : 61 if math.isnan(bad) else 62].tolist()  # one bad batch may be bad luck


def test_sweep_stops_when_the_loss_diverges() -> None:
    losses = np.concatenate([np.full(60, 0.5), 0.5 * 1.3 ** np.arange(40)])
    taken = sweep(losses)
    assert 60 + math.log(4, 1.3) <= taken < 60 + math.log(4, 1.3) + 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_sweep_stops_at_a_loss_that_is_no_number(bad: float) -> None:
    assert sweep(np.array([0.5] * 30 + [bad] + [0.5] * 69)) == 30


def test_sweep_goes_on_through_noise() -> None:
    assert sweep(np.array([0.5, 1.9] * 50)) == 100


def test_one_batch_of_three_images_does_not_end_a_sweep() -> None:
    """One of them has the wrong label."""
    assert sweep(np.array([0.01] * 4 + [5.0] + [0.01] * 45 + [7.0] + [0.01] * 49)) == 100


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("typical", [0.001, 0.01, 0.03])
def test_where_next_to_nothing_is_lost_an_unlucky_batch_does_not_make_the_pick(seed: int, typical: float) -> None:
    """Losses of a good network are small, and now and then twenty times as large; the network breaks at 0.3."""
    rng = np.random.default_rng(seed)
    losses = typical * np.exp(1.2 * rng.normal(size=100)) + (RATES / 0.3) ** 2 * 0.4
    losses[rng.integers(4)] = max(20 * typical, 0.1)
    picks = suggest(RATES[: np.flatnonzero(losses > 2)[0]], losses[: np.flatnonzero(losses > 2)[0]])
    assert 0.3 / 60 < picks.minimum < 0.3 / 8


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
        lr_find(lambda rate: next(line), 1e-2, 10, 100)


class Net(nn.Module):
    """BatchNorm, dropout and a buffer that is not saved with the weights."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
        self.register_buffer("calls", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layers(x)


def training(device: torch.device | str = "cpu") -> tuple[Net, torch.optim.Optimizer, Callable[[], float]]:
    """A model in the middle of its training: Adam has moments, one module is in eval mode, one layer is frozen."""
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


def at_a_rate(optimizer: torch.optim.Optimizer, train_batch: Callable[[], float]) -> Callable[[float], float]:
    """Trains on the next batch at a rate."""

    def train_at(rate: float) -> float:
        set_rate(optimizer, rate)
        return train_batch()

    return train_at


def everything(model: Net, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """All that a sweep could change."""
    return copy.deepcopy(
        {
            "tensors": dict(model.named_parameters()) | dict(model.named_buffers()),
            "gradients": {name: p.grad for name, p in model.named_parameters()},
            "trains": {name: p.requires_grad for name, p in model.named_parameters()},
            "modes": {name: module.training for name, module in model.named_modules()},
            "optimizer": optimizer.state_dict(),
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }
    )


def same(a: object, b: object) -> bool:
    """Equal to the last bit, through nested containers."""
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
    with preserved(model, optimizer):
        curve = lr_find(at_a_rate(optimizer, train_batch), 1e-5, 1, 30)
        during = everything(model, optimizer)
    assert len(curve) > 10
    assert same(everything(model, optimizer), before)
    changed = {"tensors", "gradients", "optimizer", "python", "numpy", "cuda" if device.type == "cuda" else "torch"}
    assert all(not same(during[part], before[part]) for part in changed)  # there was something to restore


@DEVICES
def test_training_goes_on_as_if_there_had_been_no_sweep(device: torch.device) -> None:
    def losses(sweeps: bool) -> list[float]:
        random.seed(1)
        np.random.seed(1)
        model, optimizer, train_batch = training(device)
        if sweeps:
            with preserved(model, optimizer):
                lr_find(at_a_rate(optimizer, train_batch), 1e-5, 1, 20)
        return [train_batch() for _ in range(5)]

    assert losses(sweeps=True) == losses(sweeps=False)


def test_modes_gradients_and_what_trains_come_back_after_an_error() -> None:
    model, optimizer, train_batch = training()
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match="half-way"), preserved(model, optimizer):
        model.train()
        model.requires_grad_(True)
        train_batch()
        optimizer.zero_grad(set_to_none=True)
        raise RuntimeError("half-way")
    assert same(everything(model, optimizer), before)


def test_an_optimizer_that_never_stepped_is_fresh_again() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with preserved(model, optimizer):
        model(torch.randn(4, 6)).sum().backward()
        optimizer.step()
    assert not optimizer.state_dict()["state"]
    assert all(p.grad is None for p in model.parameters())


def test_groups_keep_their_share_of_the_rate() -> None:
    model, optimizer, _ = training()
    seen = []

    def train_batch() -> float:
        seen.append([group["lr"] for group in optimizer.param_groups])
        return 1.0

    lr_find(at_a_rate(optimizer, train_batch), 1e-4, 1, 10)
    np.testing.assert_allclose(seen, np.outer(exponential_rates(1e-4, 1, 10), [0.1, 1.0]))
