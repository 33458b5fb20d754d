"""Frozen work is inference: a copy of a network that computes the same in less time.

BatchNorm with kept statistics is one multiplication and one addition per channel, which the convolution before it does as
well when its weights are scaled (Jacob et al., 2018, section 3.2). On a processor with native bfloat16, oneDNN then
computes convolution and activation in one pass over memory, with weights laid out for it once.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from unfreeze.chains import POST_OPS, TOLERANCE, chains, edges
from unfreeze.device import native_bf16

Model = TypeVar("Model", bound=nn.Module)
Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(eq=False)
class StandIn:
    """What a module computes with for a while, and the ``forward`` that it alone had before, if any."""

    compute: Forward
    before: Forward | None

    @classmethod
    def put(cls, module: nn.Module, compute: Forward) -> None:
        """Let a module compute with this from now on."""
        module.forward = cls(compute, vars(module).get("forward"))

    @staticmethod
    def take_back(module: nn.Module) -> None:
        """Let a module, or a copy of it, compute as it did before; others stay as they are."""
        here = vars(module).get("forward")
        if isinstance(here, StandIn):
            del module.forward
            if here.before is not None:
                module.forward = here.before

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Activations of activations."""
        return self.compute(x)


class ConvAct(nn.Module):
    """A convolution and the activation that follows it."""

    def __init__(self, conv: nn.Conv2d, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.act = conv, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Activations (B, O, H', W') of (B, C, H, W)."""
        return self.act(self.conv(x))


class OneDNNConvAct(nn.Module):
    """`ConvAct` in bfloat16 as a single operation of oneDNN, for batches of one shape (B, C, H, W).

    The weights lie as oneDNN wants them for that shape; for others it may lay them out anew on every call, which with AMX
    took longer than the convolutions.
    """

    def __init__(self, of: ConvAct, shape: tuple[int, ...]) -> None:
        super().__init__()
        conv = of.conv
        weight = conv.weight.detach()
        self.edges = edges(conv, shape[2:])
        before, after = self.edges[::2][::-1], self.edges[1::2][::-1]  # of height and width
        if conv.dilation == (1, 1) and all(0 <= b <= a for b, a in zip(before, after, strict=True)):
            # Rows of zeros before the kernel's make uneven edges even, which oneDNN adds without a copy of the image.
            (top, left), padding = (a - b for b, a in zip(before, after, strict=True)), list(after)
            weight, self.edges = F.pad(weight, (left, 0, top, 0)), (0, 0, 0, 0)
        else:
            padding = [0, 0]
        self.arguments: tuple[Any, ...] = (padding, list(conv.stride), list(conv.dilation), conv.groups)
        left, right, top, bottom = self.edges
        padded = (*shape[:2], shape[2] + top + bottom, shape[3] + left + right)
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # whose stub lacks the last argument
        packed = reorder(weight.bfloat16().to_mkldnn(), *self.arguments, padded)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().bfloat16(), requires_grad=False)
        self.post = POST_OPS[type(of.act)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Activations (B, O, H', W'), bfloat16, of (B, C, H, W)."""
        x = x.bfloat16()
        if any(self.edges):
            x = F.pad(x, self.edges)
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.arguments, *self.post, "")


def frozen_copy(network: Model, images: torch.Tensor) -> Model:
    """A copy of a network that predicts the same, faster, and cannot be trained.

    Which modules follow one another is seen by running the network once; a copy whose output differs all the same
    (something else in it uses what was between them) is discarded.

    Args:
        network: maps the images to anything with one tensor; as it stands in eval mode is what the copy predicts.
        images: (B, 3, S, S) normalised, on the network's device: a batch as the copy is for. Two of them are computed.

    Returns:
        The copy in eval mode without gradients; the network itself where it is one already, or has no convolutions.
    """
    kinds = {type(module) for module in network.modules()}
    if OneDNNConvAct in kinds or not any(issubclass(kind, nn.Conv2d) for kind in kinds):
        return network
    folded = _eval_copy(network)
    batch, images = len(images), images[:2].float()
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        expected = folded(images)
        shapes = _fold(folded, images)
        found = folded(images)
    if not torch.allclose(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max())):
        return _eval_copy(network)
    if images.device.type == "cpu" and native_bf16(images.device):
        for name, module in list(folded.named_modules()):
            if name in shapes and type(module) is ConvAct and type(module.act) in POST_OPS:
                count, *shape = shapes[name]
                folded.set_submodule(name, OneDNNConvAct(module, (count * batch // len(images), *shape)))
            elif isinstance(module, nn.Linear):
                module.weight.data = module.weight.data.bfloat16()  # as autocast would, but once
    return folded


def _eval_copy(network: Model) -> Model:
    # By way of training mode, as some attention keeps what it computed in eval mode, with weights of that time, until then.
    plain = copy.deepcopy(network).train().eval().requires_grad_(False)
    for module in plain.modules():
        StandIn.take_back(module)
    return plain


def _fold(network: nn.Module, images: torch.Tensor) -> dict[str, tuple[int, ...]]:
    """Fold every BatchNorm into the convolution before it and join convolutions with the activation after them.

    Returns:
        Shape (B, C, H, W) of the input of each `ConvAct`, by its name.
    """
    for name, module in list(network.named_modules()):
        if isinstance(module, _BatchNorm) and isinstance(getattr(module, "act", None), nn.Module):
            network.set_submodule(name, _split(module))  # timm's BatchNorm with drop and activation inside

    names = {module: name for name, module in network.named_modules()}
    shapes = {}
    for conv, norm, act, shape in chains(network, images):
        if norm is not None:
            assert norm.running_mean is not None and norm.running_var is not None
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            conv.requires_grad_(False)
            network.set_submodule(names[norm], nn.Identity())
        if act is not None:
            network.set_submodule(names[act], nn.Identity())
        network.set_submodule(names[conv], ConvAct(conv, act or nn.Identity()))
        shapes[names[conv]] = shape
    return shapes


def _split(module: Any) -> nn.Sequential:
    norm = nn.BatchNorm2d(module.num_features, module.eps, module.momentum, module.affine)
    norm.load_state_dict(module.state_dict())
    return nn.Sequential(norm, *(part for part in (module.drop, module.act) if type(part) is not nn.Identity)).eval()
