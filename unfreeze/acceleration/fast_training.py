"""Train the same network in less time on a CPU: kept statistics, frozen layers, depthwise convolutions.

A BatchNorm with kept statistics multiplies and adds per channel. Where the weights of the convolution before it are
multiplied instead, what was work on every pixel and back is work on a few numbers, and the gradients of its scale and shift
follow by the chain rule. Layers that are frozen whole are inference (`unfreeze.acceleration.frozen`).
"""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from unfreeze.acceleration.conv_chains import POST_OPS, TOLERANCE, called, chains, edges, plain, traced
from unfreeze.acceleration.depthwise import depthwise, slow_in_half, slow_to_train
from unfreeze.acceleration.frozen import ConvAct, Forward, OneDNNConvAct, StandIn
from unfreeze.device import native_bf16

Layer = tuple[nn.Conv2d, _BatchNorm | None, nn.Module | None, tuple[int, ...]]
"""A convolution to train with the BatchNorm and the activation that follow it, if any, and the shape of its input."""


@contextmanager
def fast_training(network: nn.Module, images: torch.Tensor) -> Iterator[None]:
    """While it lasts, the network computes the same faster, and so do its gradients.

    Modules keep their parameters, buffers and names, so an optimizer or a checkpoint knows nothing of it; a copy is made by
    `frozen_copy`, as one by `copy.deepcopy` would go on with the weights of the original. On a processor with native
    bfloat16, frozen layers compute in it: the network is to be run under `unfreeze.device.autocast`.

    Which modules follow one another is seen by running the network once. Where its output differs all the same, only
    depthwise convolutions are faster. On other devices than a CPU nothing changes, as nobody has measured that it helps.

    Args:
        network: ready to train: what is frozen is frozen, and BatchNorms that keep their statistics are in eval mode.
        images: (B, 3, S, S) normalised, on the network's device: a batch as it will be trained on. Two are computed.
    """
    forwards = _forwards(network, images) if images.device.type == "cpu" else {}
    with _replaced(forwards):
        yield


@contextmanager
def _replaced(forwards: dict[nn.Module, Forward]) -> Iterator[None]:
    for module, forward in forwards.items():
        StandIn.put(module, forward)
    try:
        yield
    finally:
        for module in forwards:
            StandIn.take_back(module)


def _forwards(network: nn.Module, images: torch.Tensor) -> dict[nn.Module, Forward]:
    """What each module is to compute with instead of its own way."""
    batch, images = len(images), images[:2].float()
    alone: dict[nn.Module, Forward] = {conv: _convolution(conv, None) for conv in network.modules() if plain(conv)}
    training = {module for module in network.modules() if module.training}
    network.eval()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        with _loud(network):
            expected, found = network(images), _layers(network, images)
            forwards = dict(alone)
            for conv, norm, _, _ in found:
                if norm is not None and norm not in training:
                    forwards |= {conv: _convolution(conv, norm), norm: _after(norm)}
            frozen = found if native_bf16(images.device) else []
            with _replaced(_joined(frozen, forwards, None)):
                seen = network(images)
        finite = bool(expected.isfinite().all())
        same = finite and torch.allclose(seen, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))
        forwards = _joined(frozen, forwards, batch) if same else alone
    network.train()  # and not by the flag alone: some attention keeps what it computed in eval mode until then
    for module in network.modules():
        module.training = module in training
    return forwards


def _layers(network: nn.Module, images: torch.Tensor) -> list[Layer]:
    """The layers of the network whose modules are called nowhere else, as a module computes the same wherever it is called."""
    graph = traced(network, images, trains=True)
    if graph is None:
        return []
    calls = Counter(called(graph, call) for call in graph.graph.nodes)
    return [
        (c.conv, c.norm, c.act if calls[c.act] == 1 and not c.adds else None, c.inputs[0].meta["shape"])
        for c in chains(graph)
        if calls[c.conv] == 1 and (c.norm is None or calls[c.norm] == 1)
    ]


@contextmanager
def _loud(network: nn.Module) -> Iterator[None]:
    """With other norms and biases: one that does nothing yet, or a branch scaled by nothing, would hide what training changes."""
    parameters = [p for p in network.parameters() if p.ndim < 2]
    kept = [p.data for p in parameters]
    own = torch.Generator().manual_seed(0)
    for p in parameters:
        p.data = torch.rand(p.shape, generator=own) + 0.5
    try:
        yield
    finally:
        for p, data in zip(parameters, kept, strict=True):
            p.data = data


def _joined(frozen: list[Layer], forwards: dict[nn.Module, Forward], batch: int | None) -> dict[nn.Module, Forward]:
    joined = dict(forwards)
    for layer in frozen:
        joined |= _frozen(layer, forwards, batch)
    return joined


def _convolution(conv: nn.Conv2d, norm: _BatchNorm | None) -> Forward:
    """What a convolution computes, and a BatchNorm with kept statistics after it, by scaled weights."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight, bias = (conv.weight, conv.bias) if norm is None else _folded(conv.weight, conv.bias, norm)
        half = torch.is_autocast_enabled("cpu")
        around = edges(conv, x.shape[2:])
        trained = x.requires_grad or weight.requires_grad
        if trained and slow_to_train(conv, half):
            kind = torch.bfloat16 if half else x.dtype
            return depthwise(x.to(kind), weight.to(kind), None if bias is None else bias.to(kind), conv.stride, around)
        left, right, top, bottom = around
        stride, padding = conv.stride, (top, left)
        if (left, top) != (right, bottom):
            x, padding = F.pad(x, around), (0, 0)
        if conv.kernel_size == (1, 1) and padding == (0, 0):
            # Of eight channels or fewer, the gradient of strided weights that see one pixel is a segmentation fault.
            x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
        if trained and half and slow_in_half(conv):
            with torch.autocast("cpu", enabled=False):
                return F.conv2d(x.float(), weight, bias, stride, padding, conv.dilation, conv.groups).bfloat16()
        return F.conv2d(x, weight, bias, stride, padding, conv.dilation, conv.groups)

    return forward


def _folded(weight: torch.Tensor, bias: torch.Tensor | None, norm: _BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    assert norm.running_mean is not None and norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    shift = (-norm.running_mean if bias is None else bias - norm.running_mean) * scale
    return weight * scale[:, None, None, None], shift if norm.bias is None else shift + norm.bias


def _after(norm: Any) -> Forward:
    """What is left of a BatchNorm: nothing, or the activation that timm puts into it."""
    return (lambda x: norm.act(norm.drop(x))) if _has_act(norm) else _same


def _frozen(layer: Layer, forwards: dict[nn.Module, Forward], batch: int | None) -> dict[nn.Module, Forward]:
    """A layer that is frozen whole as one operation of oneDNN, which has no gradient; without a batch size, the same slowly."""
    conv, norm, act, (_, *shape) = layer
    parts = [conv] if norm is None else [conv, norm]
    if any(part not in forwards or any(p.requires_grad for p in part.parameters()) for part in parts):
        return {}
    emptied, last = act, act or nn.Identity()
    inside: Any = norm
    if _has_act(norm):  # at the end of timm's BatchNorm
        fits = type(inside.act) in POST_OPS and isinstance(inside.drop, nn.Identity)
        emptied, last = (norm, inside.act) if fits else (None, nn.Identity())
    last, slow = copy.deepcopy(last), forwards[conv]  # a copy, as the module itself will do nothing
    found: dict[nn.Module, Forward] = {conv: lambda x: last(slow(x))}
    if batch is not None:
        folded = conv if norm is None else fuse_conv_bn_eval(conv, norm)
        fast = OneDNNConvAct(ConvAct(folded, last), (batch, *shape))
        # Something before it may train after all, in a network that is no simple line.
        found = {conv: lambda x: last(slow(x)) if x.requires_grad else fast(x)}
    return found if emptied is None else found | {emptied: _same}


def _has_act(norm: _BatchNorm | None) -> bool:
    return isinstance(getattr(norm, "act", None), nn.Module)


def _same(x: torch.Tensor) -> torch.Tensor:
    return x
