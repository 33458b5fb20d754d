"""Faster training: the same outputs and gradients as the original network, for all kinds of layers."""

import dataclasses
import statistics
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.unfreeze.acceleration.test_frozen import (
    FOLDED,
    OTHERS,
    AddsInPlace,
    Branching,
    Chooses,
    Remembers,
    Shared,
    requires_bf16,
    trained,
)
from unfreeze.acceleration.depthwise import slow_to_train
from unfreeze.acceleration.fast_training import fast_training
from unfreeze.acceleration.frozen import frozen_copy
from unfreeze.device import autocast
from unfreeze.models.classifier import Classifier, Head
from unfreeze.models.freezing import freeze_to, set_train_mode

CPU = torch.device("cpu")
SIZE = 64


@dataclasses.dataclass
class Step:
    logits: torch.Tensor
    buffers: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    operations: list[str]


def step(model: Classifier, images: torch.Tensor, half: bool = False) -> Step:
    """Results of one training step, without changing the weights."""
    torch.manual_seed(1)
    with autocast(CPU) if half else nullcontext():
        logits = model(images).float()
    logits.logsumexp(1).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return Step(logits.detach(), buffers, gradients, list(operations(logits.grad_fn)))


def operations(node: object) -> Iterator[str]:
    """Names of the operations in the autograd graph."""
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
    for key, buffer in expected.buffers.items():
        torch.testing.assert_close(ours.buffers[key], buffer, atol=1e-5, rtol=1e-4)
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
    model.head.eval()  # its BatchNorm over four images would amplify the differences
    exact, rounded = step(model, images), step(model, images, half=True)
    with fast_training(model.backbone, images):
        ours = step(model, images, half=True)
    assert ours.gradients.keys() == exact.gradients.keys()
    assert apart(ours.logits, exact.logits) < 2 * apart(rounded.logits, exact.logits) + 1e-3
    # For a single tensor, the larger of the two errors is a matter of chance. The median over all tensors is not.
    ratios, largest = [], max(float(g.norm()) for g in exact.gradients.values())
    for key, gradient in exact.gradients.items():
        error, allowed = (float((found.gradients[key] - gradient).norm()) for found in (ours, rounded))
        assert error < 3 * allowed + 0.1 * float(gradient.norm()) + 1e-3 * largest, key
        ratios.append(error / max(allowed, 1e-6 * largest))
    assert statistics.median(ratios) < 1.5


@pytest.mark.parametrize("name", [*FOLDED, "timm:fasternet_t0", "torchvision:mobilenet_v3_small"])
def test_kept_statistics_cost_nothing_per_pixel(name: str) -> None:
    model, images = classifier(name, 0)
    usual = step(model, images)
    with fast_training(model.backbone, images):
        ours = step(model, images)
    norms = [module for module in model.backbone.modules() if isinstance(module, _BatchNorm)]
    assert norms and any("BatchNorm" in name for name in usual.operations)
    assert sum("BatchNorm" in name for name in ours.operations) <= 1  # the BatchNorm of the head


@pytest.mark.parametrize("name", ["timm:test_convnext", "torchvision:mobilenet_v3_small"])
def test_gradients_of_wide_depthwise_convolutions_are_ours(name: str) -> None:
    model, images = classifier(name, 0)
    wide = [m for m in model.modules() if isinstance(m, nn.Conv2d) and slow_to_train(m, half=False)]
    with fast_training(model.backbone, images):
        assert step(model, images).operations.count("_DepthwiseBackward") == len(wide) > 2


@requires_bf16
def test_frozen_layers_are_inference() -> None:
    model, images = classifier("timm:tf_efficientnet_lite0", 1)
    with fast_training(model.backbone, images), torch.profiler.profile() as profile:
        step(model, images, half=True)
    counts = {event.key: event.count for event in profile.key_averages()}
    frozen = [m for m in model.modules() if isinstance(m, nn.Conv2d) and not m.weight.requires_grad]
    assert counts["mkldnn::_convolution_pointwise"] == len(frozen) > 15


@requires_bf16
def test_frozen_layers_train_on_without_the_private_convolutions(changed_convolutions: None) -> None:
    model, images = classifier("timm:test_efficientnet", 1)
    expected = step(model, images, half=True)
    with fast_training(model.backbone, images):
        ours = step(model, images, half=True)
    assert ours.gradients.keys() == expected.gradients.keys()
    torch.testing.assert_close(ours.logits, expected.logits, rtol=0.1, atol=0.1)


def test_afterwards_the_network_is_as_it_was() -> None:
    model, images = classifier("timm:tf_efficientnet_lite0", 1)
    with pytest.raises(KeyboardInterrupt), fast_training(model.backbone, images):
        assert any("forward" in module.__dict__ for module in model.modules())
        raise KeyboardInterrupt
    assert not any("forward" in module.__dict__ for module in model.modules())


class FrozenMiddle(nn.Module):
    """A trainable layer comes before frozen layers."""

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
    """Dropout between the convolution and the BatchNorm. In eval mode, it has no effect."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.drop(self.conv(x)))).mean((2, 3))


class FrozenBranch(Branching):
    """The output of a frozen BatchNorm is used by the activation and by a second branch."""

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


class Wide(Branching):
    """5 x 5 convolutions that cannot be folded and train slowly: one is called twice, one has two outputs per group."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 5, padding=2, groups=3)
        self.norm, self.more = nn.BatchNorm2d(3), nn.Conv2d(3, 6, 5, groups=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.conv(self.conv(x))
        return self.more(self.act(self.norm(seen)) + seen).mean((2, 3))


def test_a_norm_that_does_nothing_yet_hides_no_branch() -> None:
    network, images = Branching(), torch.randn(3, 3, 16, 16)
    network.norm.eval()
    with fast_training(network, images):
        assert "forward" not in vars(network.norm)


@pytest.mark.parametrize("half", [False, True])
def test_depthwise_convolutions_are_fast_even_where_nothing_can_be_folded(
    request: pytest.FixtureRequest, half: bool
) -> None:
    if half:
        request.getfixturevalue("native_bfloat16")
    torch.manual_seed(0)
    network, images = Wide(), torch.randn(3, 3, 16, 16)
    network.norm.eval()
    model = Classifier(network, nn.Identity())
    exact = step(model, images)
    with fast_training(network, images):
        ours = step(model, images, half)
    assert "forward" not in vars(network.norm)
    assert ours.operations.count("_DepthwiseBackward") == 2
    for key, gradient in exact.gradients.items():
        assert apart(ours.gradients[key], gradient) < (0.03 if half else 1e-5), key
    # A convolution without our own gradient is computed in float32.
    kinds = []
    with fast_training(network, images), autocast(CPU) if half else nullcontext():
        hook = network.more.register_forward_hook(lambda _, inputs, output: kinds.append(output.grad_fn.name()))
        network(images)
        hook.remove()
    assert kinds == ["ToCopyBackward0" if half else "ConvolutionBackward0"]


@pytest.mark.parametrize("kind", [Branching, AddsInPlace, Shared, Chooses, FrozenMiddle, Dropping])
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


def test_a_copy_made_meanwhile_is_of_the_network_itself() -> None:
    model, images = classifier("timm:tf_efficientnet_lite0", 0)
    expected = frozen_copy(model.backbone, images)
    with fast_training(model.backbone, images):
        copied = frozen_copy(model.backbone, images)
    assert not any("forward" in vars(module) for module in copied.modules())
    with torch.no_grad(), autocast(CPU):
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(copied(images), expected(images))


class Tied(Branching):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Sequential(self.conv)


def test_the_check_leaves_tied_modules_as_they_were() -> None:
    network, images = Tied(), torch.randn(3, 3, 16, 16)
    before = [(p, p.clone()) for p in network.parameters()]
    with fast_training(network, images):
        pass
    for (parameter, value), now in zip(before, network.parameters(), strict=True):
        assert now is parameter and torch.equal(now, value)
    assert network.again[0].bias is network.conv.bias


def test_a_stem_that_sees_one_pixel_of_few_channels_can_be_trained() -> None:
    """Its float32 weight gradient crashes in PyTorch 2.15 (SIGSEGV). RepVGG, MobileOne and FastViT have such stems."""
    stem = nn.Conv2d(3, 48, 1, 2, bias=False).to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 96, 96).contiguous(memory_format=torch.channels_last)
    expected = torch.einsum("bchw->c", images[:, :, ::2, ::2]).expand(48, 3)
    with fast_training(stem, images):
        stem(images).sum().backward()
    torch.testing.assert_close(stem.weight.grad[..., 0, 0], expected, atol=1e-2, rtol=1e-4)


def test_what_attention_kept_from_the_check_is_forgotten() -> None:
    network, images = Remembers(), torch.randn(3, 3, 16, 16)
    with fast_training(network, images):
        assert network.kept is None and network.training


def test_a_module_gets_back_the_forward_that_it_had_by_itself() -> None:
    network, images = Branching(), torch.randn(3, 3, 16, 16)
    network.norm.eval()
    for module in (network.conv, network.norm):
        module.forward = module.twice = lambda x, module=module: 2 * type(module).forward(module, x)
    expected = network(images)
    with fast_training(network, images), fast_training(network, images):
        torch.testing.assert_close(network(images), expected)
    assert network.conv.forward is network.conv.twice and network.norm.forward is network.norm.twice
