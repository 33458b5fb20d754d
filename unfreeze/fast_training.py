"""Train the same network in less time on a CPU: kept statistics, frozen layers, depthwise convolutions.

A BatchNorm with kept statistics multiplies and adds per channel. Where the weights of the convolution before it are
multiplied instead, what was work on every pixel and back is work on a few numbers, and the gradients of its scale and shift
follow by the chain rule. Layers that are frozen whole are inference (`unfreeze.frozen`).
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from unfreeze.chains import POST_OPS, TOLERANCE, Chain, chains, edges
from unfreeze.depthwise import depthwise, slow_to_train
from unfreeze.device import native_bf16
from unfreeze.frozen import ConvAct, OneDNNConvAct

Forward = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def fast_training(network: nn.Module, images: torch.Tensor) -> Iterator[None]:
    """While it lasts, the network computes the same faster, and so do its gradients.

    Modules keep their parameters, buffers and names, so an optimizer, a checkpoint or a copy of the network knows nothing
    of it. Which modules follow one another is seen by running the network once; where its output differs all the same,
    everything stays as it was. So it does on other devices than a CPU, where nobody has measured that it helps.

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
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.__dict__["forward"]


def _forwards(network: nn.Module, images: torch.Tensor) -> dict[nn.Module, Forward]:
    """What each module is to compute with instead of its own way."""
    batch, images = len(images), images[:2].float()
    training = [module for module in network.modules() if module.training]
    network.eval()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        # A BatchNorm that does nothing yet, or a branch scaled by nothing, would hide what the training then changes.
        own = torch.Generator().manual_seed(0)
        loud = {n: torch.rand(p.shape, generator=own) + 0.5 for n, p in network.named_parameters() if p.ndim < 2}
        expected, found = functional_call(network, loud, (images,)), chains(network, images)
        forwards: dict[nn.Module, Forward] = {}
        for conv, norm, _, _ in found:
            kept = norm is not None and norm not in training
            forwards[conv] = _convolution(conv, norm if kept else None)
            if norm is not None and kept:
                forwards[norm] = _after(norm)
        joined = dict(forwards)
        for chain in found if native_bf16(images.device) else []:
            joined |= _frozen(chain, forwards, None)
        with _replaced(joined):
            seen = functional_call(network, loud, (images,))
        same = torch.allclose(seen, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))
    for module in training:
        module.training = True
    if not same:
        return {}
    for chain in found if native_bf16(images.device) else []:
        joined |= _frozen(chain, forwards, batch)
    return joined


def _convolution(conv: nn.Conv2d, norm: _BatchNorm | None) -> Forward:
    """What a convolution computes, and a BatchNorm with kept statistics after it, by scaled weights."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight, bias = (conv.weight, conv.bias) if norm is None else _folded(conv.weight, conv.bias, norm)
        half = torch.is_autocast_enabled("cpu")
        around = edges(conv, x.shape[2:])
        if slow_to_train(conv, half):
            kind = torch.bfloat16 if half else x.dtype
            return depthwise(x.to(kind), weight.to(kind), None if bias is None else bias.to(kind), conv.stride, around)
        left, right, top, bottom = around
        if (left, top) == (right, bottom):
            return F.conv2d(x, weight, bias, conv.stride, (top, left), conv.dilation, conv.groups)
        return F.conv2d(F.pad(x, around), weight, bias, conv.stride, 0, conv.dilation, conv.groups)

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


def _frozen(chain: Chain, forwards: dict[nn.Module, Forward], batch: int | None) -> dict[nn.Module, Forward]:
    """A chain that is frozen whole as one operation of oneDNN, which has no gradient; without a batch size, the same slowly."""
    conv, norm, act, (_, *shape) = chain
    parts = [conv] if norm is None else [conv, norm]
    if any(part not in forwards or any(p.requires_grad for p in part.parameters()) for part in parts):
        return {}
    owner, last = act, act or nn.Identity()
    inside: Any = norm
    if _has_act(norm):  # at the end of timm's BatchNorm
        fits = type(inside.act) in POST_OPS and isinstance(inside.drop, nn.Identity)
        owner, last = (norm, inside.act) if fits else (None, nn.Identity())
    last, slow = copy.deepcopy(last), forwards[conv]  # a copy, as the module itself will do nothing
    found: dict[nn.Module, Forward] = {conv: lambda x: last(slow(x))}
    if batch is not None:
        folded = copy.deepcopy(conv) if norm is None else fuse_conv_bn_eval(conv, norm)
        fast = OneDNNConvAct(ConvAct(folded, last), (batch, *shape))
        # Something before it may train after all, in a network that is no simple line.
        found = {conv: lambda x: last(slow(x)) if x.requires_grad else fast(x)}
    return found if owner is None else found | {owner: _same}


def _has_act(norm: _BatchNorm | None) -> bool:
    return isinstance(getattr(norm, "act", None), nn.Module)


def _same(x: torch.Tensor) -> torch.Tensor:
    return x
