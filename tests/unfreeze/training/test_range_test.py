"""The LR range test: which batches a sweep takes, when it ends, and that it restores all state."""

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
from unfreeze.training.lr_curve import make_curve
from unfreeze.training.range_test import Losses, lr_find
from unfreeze.training.state import restored

Floats = NDArray[np.float64]
RATES = np.geomspace(1e-5, 10, 100)
CLASSES = 7


def test_sweep_trains_once_at_every_rate() -> None:
    given: list[float] = []
    losses = np.linspace(1.0, 0.5, 100)

    def train_at(rate: float) -> Losses:
        given.append(rate)
        return float(losses[len(given) - 1]), 1.0

    curve = lr_find(train_at, 1e-5, 10, 100, CLASSES)
    np.testing.assert_allclose(given, RATES)
    pd.testing.assert_frame_equal(curve, make_curve(RATES, losses, np.ones(100)))


def sweep(losses: Floats, classes: int = CLASSES, starting: float = 0.5) -> int:
    """Number of batches that a sweep with these losses takes."""
    line = iter(losses)
    return len(lr_find(lambda rate: (float(next(line)), starting), 1e-5, 10, len(losses), classes))


@pytest.mark.parametrize("bad", [math.nan, 50.0])
@pytest.mark.parametrize("before", [0, 1, 30, 59, 60, 61])
def test_sweep_goes_on_after_the_losses_that_are_there(before: int, bad: float) -> None:
    losses = [(0.5, 0.4), (0.4, 0.5)] * 30 + [(bad, 0.5)] * 2 + [(0.5, 0.5)] * 38
    line = iter(losses[before:])
    given: list[float] = []

    def train_at(rate: float) -> Losses:
        given.append(rate)
        return next(line)

    found = lr_find(train_at, 1e-5, 10, 100, CLASSES, losses[:before])
    line = iter(losses)
    pd.testing.assert_frame_equal(found, lr_find(lambda rate: next(line), 1e-5, 10, 100, CLASSES))
    assert given == RATES[before : 61 if math.isnan(bad) else 62].tolist()  # one bad batch may be chance


@pytest.mark.parametrize(("classes", "batches"), [(2, 69), (7, 88), (100, 128)])
def test_sweep_stops_when_the_loss_exceeds_that_of_a_uniform_prediction(classes: int, batches: int) -> None:
    losses = np.concatenate([np.full(60, 0.5), 0.5 + 0.1 * np.arange(140)])
    assert sweep(losses, classes) == batches


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_sweep_stops_at_a_loss_that_is_no_number(bad: float) -> None:
    assert sweep(np.array([0.5] * 30 + [bad] + [0.5] * 69)) == 30


def test_sweep_goes_on_through_noise() -> None:
    """Every other loss is far above the limit, but their running mean is not."""
    assert sweep(np.array([0.5, 4.5] * 50)) == 100


def test_one_batch_of_three_images_does_not_end_a_sweep() -> None:
    """One of the images has the wrong label, and the running mean exceeds the limit, but not the median of three."""
    assert sweep(np.array([0.01] * 4 + [12.0] + [0.01] * 45 + [20.0] + [0.01] * 49)) == 100


@pytest.mark.parametrize("seed", range(5))
def test_sweep_of_a_good_network_does_not_take_a_few_mistakes_for_divergence(seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert sweep(np.where(rng.random(100) < 0.1, 4.0, 0.001) * rng.uniform(0.5, 1.5, 100)) == 100


@pytest.mark.parametrize("seed", range(5))
def test_sweep_of_a_network_for_two_classes_goes_on_through_a_plateau(seed: int) -> None:
    """Up to batch 50 nearly all is right. Then the network gives about the same prediction for all images."""
    rng = np.random.default_rng(seed)
    losses = np.concatenate([rng.exponential(0.06, 50), rng.normal(0.7, 0.15, 50)])
    assert sweep(losses, 2, 0.06) == 100


@pytest.mark.parametrize(
    "losses", [[math.nan], [0.7, math.inf], [0.7, 3, 50, 900], [0.7, 0.6, 0.7, 0.8, 1, 2, 9, 50, 50]]
)
def test_a_sweep_that_diverges_at_once_is_told(losses: list[float]) -> None:
    line = iter(losses)
    with pytest.raises(UserError, match=r"diverged at once.*lower lr_find\.start \(or unfreeze_lr_find\.start\)"):
        lr_find(lambda rate: (next(line), 0.7), 1e-2, 10, 100, 2)


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
        curve = lr_find(at_a_rate(optimizer, train_batch), 1e-5, 1, 30, CLASSES)
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
                lr_find(at_a_rate(optimizer, train_batch), 1e-5, 1, 20, CLASSES)
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

    lr_find(at_a_rate(optimizer, train_batch), 1e-4, 1, 10, CLASSES)
    np.testing.assert_allclose(seen, np.outer(np.geomspace(1e-4, 1, 10), [0.1, 1.0]))
