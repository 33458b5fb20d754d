"""Faster training on a CPU: BatchNorms with fixed statistics, frozen layers, depthwise convolutions.

A BatchNorm with fixed statistics is one multiplication and one addition per channel. They are folded into the weights
and bias of the preceding convolution, so that they are applied to each weight instead of each pixel. The gradients of
the BatchNorm's scale and shift follow by the chain rule. Completely frozen layers run as inference
(`unfreeze.acceleration.frozen`).
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
from unfreeze.acceleration.frozen import ConvAct, Forward, OneDNNConvAct, StandIn, fused_convolutions_work
from unfreeze.device import precision

Layer = tuple[nn.Conv2d, _BatchNorm | None, nn.Module | None, tuple[int, ...]]
"""A convolution to train with the BatchNorm and the activation that follow it, if any, and the shape of its input."""


@contextmanager
def fast_training(network: nn.Module, images: torch.Tensor) -> Iterator[None]:
    """Speed up a network's forward and backward pass on a CPU while the block runs, with the same results.

    Modules keep their parameters, buffers and names, so optimizers and checkpoints are not affected. To copy the
    network in the block use `frozen_copy`: a copy by `copy.deepcopy` would compute with the weights of the original.
    On a CPU that computes in bfloat16, frozen layers are replaced by bfloat16 operations, so run the network under
    `unfreeze.device.autocast`.

    The network is traced to find which modules follow one another. If its output with all replacements differs, only
    depthwise convolutions are accelerated. On other devices nothing changes, because the speed was not measured there.

    Args:
        network: ready to train: frozen parameters require no gradient, BatchNorms with fixed
            statistics are in eval mode.
        images: (B, 3, S, S) normalised, on the network's device: a typical training batch. The network is run
            on two of them.
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
    """The replacement of each module's ``forward``."""
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
            half = precision(images.device) == torch.bfloat16
            frozen = found if half and fused_convolutions_work() else []
            with _replaced(_joined(frozen, forwards, None)):
                seen = network(images)
        finite = bool(expected.isfinite().all())
        same = finite and torch.allclose(seen, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))
        forwards = _joined(frozen, forwards, batch) if same else alone
    network.train()  # setting the flags is not enough: `train` clears what attention modules cached in eval mode
    for module in network.modules():
        module.training = module in training
    return forwards


def _layers(network: nn.Module, images: torch.Tensor) -> list[Layer]:
    """The layers of the network whose modules are called only once: a replaced ``forward`` would affect all calls."""
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
    """Randomize norms and biases while the block runs.

    Identity norms, and branches scaled by zero, would hide differences that appear only during training.
    """
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
    """``forward`` of a convolution with the BatchNorm after it, if any, folded into its weights."""

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
            # With eight channels or fewer, the weight gradient of a strided 1 x 1 convolution crashes (SIGSEGV).
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
    """``forward`` of a folded BatchNorm: the identity, or the activation that timm puts into it."""
    return (lambda x: norm.act(norm.drop(x))) if _has_act(norm) else nn.Identity()


def _frozen(layer: Layer, forwards: dict[nn.Module, Forward], batch: int | None) -> dict[nn.Module, Forward]:
    """Replacements for a completely frozen layer, as one oneDNN operation without gradient.

    Without a batch size the same is computed by separate, slower operations.
    """
    conv, norm, act, (_, *shape) = layer
    parts = [conv] if norm is None else [conv, norm]
    if any(part not in forwards or any(p.requires_grad for p in part.parameters()) for part in parts):
        return {}
    emptied, last = act, act or nn.Identity()
    inside: Any = norm
    if _has_act(norm):  # at the end of timm's BatchNorm
        fits = type(inside.act) in POST_OPS and isinstance(inside.drop, nn.Identity)
        emptied, last = (norm, inside.act) if fits else (None, nn.Identity())
    last, slow = copy.deepcopy(last), forwards[conv]  # a copy, as the module itself becomes a no-op
    found: dict[nn.Module, Forward] = {conv: lambda x: last(slow(x))}
    if batch is not None:
        folded = conv if norm is None else fuse_conv_bn_eval(conv, norm)
        fast = OneDNNConvAct(ConvAct(folded, last), (batch, *shape))
        # In a network with branches, an earlier layer may still be trained, and then the input needs a gradient.
        found = {conv: lambda x: last(slow(x)) if x.requires_grad else fast(x)}
    return found if emptied is None else found | {emptied: nn.Identity()}


def _has_act(norm: _BatchNorm | None) -> bool:
    return isinstance(getattr(norm, "act", None), nn.Module)
