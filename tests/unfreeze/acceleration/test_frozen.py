"""Copies for prediction: the same outputs as the original network, for all kinds of layers."""

import pytest
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.devices import DEVICES
from unfreeze.acceleration.conv_chains import ADDITIONS
from unfreeze.acceleration.frozen import ConvAct, OneDNNConvAct, _eval_copy, frozen_copy
from unfreeze.device import autocast, to_device
from unfreeze.models.backbones import create_backbone
from unfreeze.models.classifier import Head

CPU = torch.device("cpu")
FOLDED = ["timm:tf_efficientnet_lite0", "timm:resnet10t", "timm:test_efficientnet", "torchvision:resnet18"]
OTHERS = [
    "timm:test_vit",
    "timm:test_convnext",
    "timm:nf_resnet26",
    "timm:fasternet_t0",  # replaces ``forward`` on some modules
    "torchvision:mobilenet_v3_small",
]
requires_bf16 = pytest.mark.usefixtures("native_bfloat16")


def trained(name: str, size: int, device: torch.device = CPU) -> nn.Module:
    """A network whose BatchNorm layers have an effect."""
    torch.manual_seed(0)
    network = to_device(create_backbone(name, "none", size), device)
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return network.train()


@DEVICES
@pytest.mark.parametrize("size", [64, 65])
@pytest.mark.parametrize("name", FOLDED + OTHERS)
def test_a_copy_predicts_what_the_network_predicts(name: str, size: int, device: torch.device) -> None:
    if "vit" in name:
        size = 160
    network = trained(name, size, device)
    images = torch.randn(4, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    fast = frozen_copy(network, images[:2])
    assert network.training and all(p.requires_grad for p in network.parameters())
    assert not fast.training and not any(p.requires_grad for p in fast.parameters())
    network.eval()
    with torch.no_grad():
        exact = network(images)
        with autocast(device):
            rounded, copied = network(images).float(), fast(images).float()
    error = (copied - exact).norm() / exact.norm()
    assert error < 1.5 * (rounded - exact).norm() / exact.norm() + 1e-3
    assert fast is not network
    assert (frozen_copy(fast, images) is fast) == isinstance(fast, fx.GraphModule)


@pytest.mark.parametrize("name", ["timm:tf_efficientnet_lite0", "torchvision:resnet18"])
def test_a_copy_in_float16_predicts_what_the_network_predicts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU with tensor cores but without bfloat16.
    monkeypatch.setattr("unfreeze.device.precision", lambda device: torch.float16)
    monkeypatch.setattr("unfreeze.acceleration.frozen.precision", lambda device: torch.float16)
    network, images = trained(name, 64).eval(), torch.randn(4, 3, 64, 64)
    fast = frozen_copy(network, images)
    convolutions = [module for module in fast.modules() if type(module) is nn.Conv2d]
    assert convolutions and all(conv.weight.dtype == torch.float16 for conv in convolutions)
    with torch.no_grad():
        exact = network(images)
        with autocast(CPU):
            copied = fast(images).float()
    assert 0 < (copied - exact).norm() < 0.01 * exact.norm()


@DEVICES
@pytest.mark.parametrize("name", FOLDED + OTHERS)
def test_a_refreshed_copy_computes_what_a_new_copy_computes(name: str, device: torch.device) -> None:
    size = 160 if "vit" in name else 64
    network = trained(name, size, device)
    images = torch.randn(4, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    earlier = frozen_copy(network, images)
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            if tensor.is_floating_point():
                tensor.mul_(1.1)
    refreshed, fresh = frozen_copy(network, images, earlier), frozen_copy(network, images)
    assert (refreshed is earlier) == isinstance(fresh, fx.GraphModule)
    with torch.no_grad(), autocast(device):
        assert torch.equal(refreshed(images), fresh(images))


@pytest.mark.parametrize("name", FOLDED)
def test_a_copy_is_where_the_network_is(name: str) -> None:
    copied = _eval_copy(create_backbone(name, "none", 64).to("meta"))  # the only other device that always exists
    assert {tensor.device.type for tensor in copied.state_dict().values()} == {"meta"}


def test_logits_are_told_apart_where_bf16_is_native() -> None:
    head = Head(4, 2, 0.0).eval()
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()
    images = torch.rand(2, 3, 8, 8)
    nn.init.zeros_(head[2].weight)
    head[2].bias.data = torch.tensor([9.0, 9.01])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for model in (network, frozen_copy(network, images)):
            logits = model(images)
            assert logits.dtype == torch.float32 and (logits[:, 0] < logits[:, 1]).all()


@pytest.mark.parametrize("name", FOLDED)
def test_every_batch_norm_after_a_convolution_is_folded(name: str) -> None:
    fast = frozen_copy(trained(name, 64), torch.randn(2, 3, 64, 64))
    assert not any(isinstance(module, _BatchNorm) for module in fast.modules())


@requires_bf16
def test_where_torch_changes_its_private_convolutions_the_public_ones_are_used(
    changed_convolutions: None, caplog: pytest.LogCaptureFixture
) -> None:
    network = trained("timm:test_efficientnet", 64)
    images = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    state = torch.get_rng_state()
    fast = frozen_copy(network, images)
    assert torch.equal(torch.get_rng_state(), state)
    kinds = {type(module) for module in fast.modules()}
    assert ConvAct in kinds and OneDNNConvAct not in kinds
    assert "frozen layers take longer" in caplog.text and len(caplog.records) == 1
    with torch.no_grad(), autocast(CPU):
        torch.testing.assert_close(fast(images).float(), network.eval()(images).float(), rtol=0.1, atol=0.1)


@requires_bf16
def test_convolution_and_activation_are_one_operation_where_bf16_is_native() -> None:
    fast = frozen_copy(trained("timm:tf_efficientnet_lite0", 64), torch.randn(2, 3, 64, 64))
    kinds = [type(module) for module in fast.modules()]
    assert kinds.count(OneDNNConvAct) == 49 and not {nn.Conv2d, ConvAct, nn.ReLU6} & set(kinds)


@requires_bf16
@pytest.mark.parametrize("name", FOLDED)
def test_no_weights_are_laid_out_anew_from_call_to_call(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Checked in oneDNN's log. Reordering weights at every call took more than half of a forward pass on AMX."""
    images = torch.randn(8, 3, 96, 96).contiguous(memory_format=torch.channels_last)
    fast = frozen_copy(trained(name, 96), images)
    with torch.no_grad(), autocast(CPU):
        fast(images)
        capfd.readouterr()
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            fast(images)
    done = [line for line in capfd.readouterr().out.splitlines() if ",exec,cpu," in line]
    assert sum(",convolution," in line for line in done) >= 12
    assert not [line for line in done if ",reorder," in line]


@requires_bf16
@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet10t"])
def test_a_residual_block_adds_and_activates_in_its_last_convolution(name: str) -> None:
    fast = frozen_copy(trained(name, 64), torch.randn(2, 3, 64, 64))
    assert isinstance(fast, fx.GraphModule)
    assert not [call for call in fast.graph.nodes if call.target in ADDITIONS]
    kinds = {type(module) for module in fast.modules()}
    assert OneDNNConvAct in kinds and nn.ReLU not in kinds


class Decides(nn.Module):
    """The modules that it calls depend on the images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.act(self.conv(x)) if x.mean() > 0 else self.conv(-x)).mean((2, 3))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_network_that_looks_at_the_images_goes_on_doing_so(sign: int) -> None:
    network, images = Decides().eval(), torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(frozen_copy(network, images)(sign * images), network(sign * images))


class Adds(nn.Module):
    """Additions that only look like those of a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        twice = self.convs[0](x)
        x = self.act(twice + twice) + self.convs[1](x)  # added after its own activation
        row = self.convs[2](x)[:, :, :1]
        x = self.act(self.convs[2](x) + row)  # another shape, and a convolution that is called twice
        both = self.convs[3](x)
        return (torch.add(both, self.convs[0](x), alpha=3) + x.add(both)).mean((2, 3))


def test_what_is_added_otherwise_stays_so() -> None:
    torch.manual_seed(0)
    network, images = Adds().eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = network(images)
        assert (frozen_copy(network, images)(images) - expected).norm() < 0.01 * expected.norm()


class SeenLater(nn.Module):
    """Adds three kinds of tensors to convolutions: used again later, the convolution's input, and not used later.

    The last kind occurs for pooled images and for the output of a convolution.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(8))
        self.pool = nn.MaxPool2d(3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.pool(x)
        first = self.convs[0](self.convs[7](self.convs[6](pooled)) + pooled)
        second = self.convs[1](first) + first
        third = self.convs[2](second) + second  # last use of ``second``, but it is also convolved
        fourth = self.convs[4](self.convs[3](third)) + third  # last use of ``third``
        return (fourth * self.convs[5](first)).mean((2, 3))


@requires_bf16
def test_a_sum_takes_the_memory_of_what_nobody_sees_later() -> None:
    torch.manual_seed(0)
    network, images = SeenLater().eval(), torch.randn(4, 3, 16, 16)
    fast = frozen_copy(network, images)
    into = [m.into for m in fast.modules() if isinstance(m, OneDNNConvAct)]
    assert into == [False, True, False, False, False, False, True, False]
    with torch.no_grad():
        expected = network(images)
        assert (fast(images) - expected).norm() < 0.02 * expected.norm()


class Branching(nn.Module):
    """The convolution's output is used twice. Module calls alone do not show this."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.conv(x)
        return self.act(self.norm(seen)).mean((2, 3)) + seen.mean((2, 3))


class AddsInPlace(Branching):
    """The BatchNorm's output is changed in place before the activation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.norm(self.conv(x))
        seen += x[:, :1, 1:-1, 1:-1]
        return self.act(seen).mean((2, 3))


class Shared(Branching):
    """One module is used in two places."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(x))).mean((2, 3)) + self.norm(self.conv(self.act(x))).mean((2, 3))


class Chooses(Branching):
    """``forward`` is set on the instance and not by the class, as in some of timm's modules."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.chosen

    def chosen(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class Remembers(Branching):
    """In eval mode, caches a value computed from its weights, as timm's LeViT does with attention biases."""

    kept: torch.Tensor | None = None

    def train(self, mode: bool = True) -> "Remembers":
        self.kept = None if mode else self.kept
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training or self.kept is None:
            self.kept = self.conv.weight.sum()
        return super().forward(x) * self.kept


def test_a_copy_predicts_from_the_weights_of_today() -> None:
    network, images = Remembers().eval(), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        network(images)
        network.conv.weight += 1
        found = frozen_copy(network, images)(images)
        expected = network.train().eval()(images)
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("kind", [Branching, AddsInPlace, Shared, Chooses])
def test_what_cannot_be_folded_is_left_as_it_is(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network = kind()
    network.norm.running_mean.normal_()
    network.norm.weight.data.uniform_(0.5, 2)
    images = torch.randn(3, 3, 16, 16)
    fast = frozen_copy(network, images)
    network.eval()
    with torch.no_grad(), autocast(CPU):
        torch.testing.assert_close(fast(images).float(), network(images).float(), atol=0.03, rtol=0.02)


def test_a_network_without_convolutions_is_its_own_copy() -> None:
    head = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    assert frozen_copy(head, torch.randn(2, 3)) is head
