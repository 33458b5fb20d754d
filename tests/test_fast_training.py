"""Training in less time: the same outputs and gradients as the network's own, whatever it is made of."""

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.test_frozen import FOLDED, OTHERS, AddsInPlace, Branching, Shared, requires_bf16, trained
from unfreeze.device import autocast
from unfreeze.fast_training import fast_training
from unfreeze.frozen import OneDNNConvAct, frozen_copy
from unfreeze.models import Classifier, Head, freeze_to, set_train_mode

CPU = torch.device("cpu")
SIZE = 64


@dataclasses.dataclass
class Step:
    logits: torch.Tensor
    gradients: dict[str, torch.Tensor]
    operations: list[str]


def step(model: Classifier, images: torch.Tensor, half: bool = False) -> Step:
    """What one training step computes, without changing the weights."""
    torch.manual_seed(1)
    with autocast(CPU) if half else nullcontext():
        logits = model(images).float()
    logits.logsumexp(1).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Step(logits.detach(), gradients, list(operations(logits.grad_fn)))


def operations(node: object) -> Iterator[str]:
    """Names of what is differentiated."""
    seen, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield type(node).__name__
            waiting += [following for following, _ in node.next_functions]


def classifier(name: str, n: int, bn_freeze: bool = True) -> tuple[Classifier, torch.Tensor]:
    size = 160 if "vit" in name else SIZE
    backbone = trained(name, size)
    model = Classifier(backbone, Head(backbone.num_features, 3, 0.0))
    freeze_to(model, n, bn_freeze)
    set_train_mode(model)
    return model, torch.randn(4, 3, size, size).contiguous(memory_format=torch.channels_last)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


@pytest.mark.parametrize("bn_freeze", [True, False])
@pytest.mark.parametrize("name", FOLDED + OTHERS)
def test_outputs_and_gradients_are_the_networks_own(name: str, bn_freeze: bool) -> None:
    model, images = classifier(name, 0, bn_freeze)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    training = [module.training for module in model.modules()]
    with fast_training(model.backbone, images):
        assert [module.training for module in model.modules()] == training
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), key
        ours = step(model, images)
    model.load_state_dict(before)
    expected = step(model, images)
    assert apart(ours.logits, expected.logits) < 1e-4
    assert ours.gradients.keys() == expected.gradients.keys()
    largest = max(float(g.norm()) for g in expected.gradients.values())
    for key, gradient in expected.gradients.items():
        error = float((ours.gradients[key] - gradient).norm())
        assert error < 1e-3 * float(gradient.norm()) + 1e-5 * largest, key


@requires_bf16
@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("name", FOLDED + OTHERS)
def test_bfloat16_rounds_no_more_than_before(name: str, n: int) -> None:
    model, images = classifier(name, n)
    model.head.eval()  # its BatchNorm, over four images, would blow the differences up
    exact, rounded = step(model, images), step(model, images, half=True)
    with fast_training(model.backbone, images):
        ours = step(model, images, half=True)
    assert ours.gradients.keys() == exact.gradients.keys()
    assert apart(ours.logits, exact.logits) < 2 * apart(rounded.logits, exact.logits) + 1e-3

    def together(found: Step) -> torch.Tensor:
        """All gradients in one line, each on the scale of the exact one."""
        return torch.cat(
            [(found.gradients[k] / g.norm().clamp(min=1e-6)).flatten() for k, g in exact.gradients.items()]
        )

    assert apart(together(ours), together(exact)) < 1.5 * apart(together(rounded), together(exact)) + 1e-3


@pytest.mark.parametrize("name", FOLDED)
def test_kept_statistics_cost_nothing_per_pixel(name: str) -> None:
    model, images = classifier(name, 0)
    usual = step(model, images)
    with fast_training(model.backbone, images):
        ours = step(model, images)
    norms = [module for module in model.backbone.modules() if isinstance(module, _BatchNorm)]
    assert norms and any("BatchNorm" in name for name in usual.operations)
    assert sum("BatchNorm" in name for name in ours.operations) <= 1  # the head's


@requires_bf16
def test_frozen_layers_are_inference() -> None:
    model, images = classifier("timm:tf_efficientnet_lite0", 1)
    with fast_training(model.backbone, images), torch.profiler.profile() as profile:
        step(model, images, half=True)
    counts = {event.key: event.count for event in profile.key_averages()}
    frozen = [m for m in model.modules() if isinstance(m, nn.Conv2d) and not m.weight.requires_grad]
    assert counts["mkldnn::_convolution_pointwise"] == len(frozen) > 15


def test_afterwards_the_network_is_as_it_was() -> None:
    model, images = classifier("timm:tf_efficientnet_lite0", 1)
    with pytest.raises(KeyboardInterrupt), fast_training(model.backbone, images):
        assert any("forward" in module.__dict__ for module in model.modules())
        raise KeyboardInterrupt
    assert not any("forward" in module.__dict__ for module in model.modules())


class FrozenMiddle(nn.Module):
    """What trains comes before what is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.norm, self.act = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        )
        self.conv.requires_grad_(False).eval()
        self.norm.requires_grad_(False).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(self.first(x)))).mean((2, 3))


class Dropping(Branching):
    """In eval mode, the dropout is not there."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.drop(self.conv(x)))).mean((2, 3))


class FrozenBranch(Branching):
    """What a frozen norm makes goes into the activation, and past it."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.norm(self.conv(x))
        return self.act(seen).mean((2, 3)) + seen.mean((2, 3))


@requires_bf16
def test_an_activation_is_not_joined_where_something_else_sees_its_input() -> None:
    torch.manual_seed(0)
    network, images = FrozenBranch(), torch.randn(3, 3, 16, 16)
    network.norm.bias.sub_(3)
    with torch.no_grad(), autocast(CPU):
        expected = network(images)
        with fast_training(network, images):
            torch.testing.assert_close(network(images), expected, atol=0.05, rtol=0.05, check_dtype=False)


def test_a_norm_that_does_nothing_yet_hides_no_branch() -> None:
    network, images = Branching(), torch.randn(3, 3, 16, 16)
    network.norm.eval()
    with fast_training(network, images):
        assert not any("forward" in module.__dict__ for module in network.modules())


@pytest.mark.parametrize("kind", [Branching, AddsInPlace, Shared, FrozenMiddle, Dropping])
def test_what_is_no_simple_line_keeps_its_gradients(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network = kind()
    network.norm.running_mean.normal_()
    network.norm.weight.data.uniform_(0.5, 2)
    network.norm.eval()
    model = Classifier(network, nn.Identity())
    images = torch.randn(3, 3, 16, 16)
    expected = step(model, images)
    with fast_training(network, images):
        ours = step(model, images)
    assert ours.gradients.keys() == expected.gradients.keys()
    for key, gradient in expected.gradients.items():
        torch.testing.assert_close(ours.gradients[key], gradient, atol=1e-4, rtol=1e-3)


@requires_bf16
def test_a_copy_made_meanwhile_is_of_the_network_itself() -> None:
    model, images = classifier("timm:tf_efficientnet_lite0", 0)
    with fast_training(model.backbone, images):
        copied = frozen_copy(model.backbone, images)
    assert sum(isinstance(module, OneDNNConvAct) for module in copied.modules()) == 49
