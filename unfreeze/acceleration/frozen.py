"""Faster inference of frozen networks: a copy of a network with the same output.

BatchNorm with fixed statistics is one multiplication and one addition per channel. Both are folded into the weights
and bias of the preceding convolution (Jacob et al., 2018, section 3.2). On a CPU that computes in bfloat16, oneDNN
then computes convolution and activation in one operation, with weights that were reordered once in advance.
"""

import copy
import dataclasses
import itertools
import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from unfreeze.acceleration.conv_chains import POST_OPS, TOLERANCE, chains, edges, traced
from unfreeze.device import deterministically, precision

logger = logging.getLogger("unfreeze")

FROZEN = "frozen copy"
"""Key of a copy's `Sources` in its ``meta``."""
Sources = dict[str, tuple[str, str | None]]
"""Maps the name of a `ConvAct` or `OneDNNConvAct` to the names of the convolution and the BatchNorm, if any, in it."""

Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(eq=False)
class StandIn:
    """A temporary replacement of a module's ``forward``, with the instance's own earlier ``forward``, if any."""

    compute: Forward
    before: Forward | None

    @classmethod
    def put(cls, module: nn.Module, compute: Forward) -> None:
        """Replace a module's ``forward`` by ``compute``."""
        module.forward = cls(compute, vars(module).get("forward"))

    @staticmethod
    def take_back(module: nn.Module) -> None:
        """Restore the earlier ``forward`` of a module or of its copy; a module without a stand-in is unchanged."""
        here = vars(module).get("forward")
        if isinstance(here, StandIn):
            del module.forward
            if here.before is not None:
                module.forward = here.before

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Call the replacement."""
        return self.compute(x)


class ConvAct(nn.Module):
    """A convolution, optionally the addition of another tensor, and an activation.

    Attributes:
        into: whether the result may overwrite the added tensor.
    """

    def __init__(self, conv: nn.Conv2d, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.act, self.into = conv, act, False

    def take(self, conv: nn.Conv2d) -> None:
        """Copy the weights of a convolution."""
        self.conv.weight.copy_(conv.weight)
        if self.conv.bias is not None and conv.bias is not None:
            self.conv.bias.copy_(conv.bias)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        """Activations (B, O, H', W') of x (B, C, H, W); ``other`` is added before the activation, if given."""
        y = self.conv(x)
        return self.act(y if other is None else y + other)


class OneDNNConvAct(nn.Module):
    """`ConvAct` in bfloat16 as a single operation of oneDNN, for batches of one shape (B, C, H, W).

    The weights are reordered once for that shape. For other shapes oneDNN may reorder them on every call, which with
    AMX took longer than the convolutions.
    """

    def __init__(self, of: ConvAct, shape: tuple[int, ...]) -> None:
        super().__init__()
        conv, self.into = of.conv, of.into
        self.zeros = (0, 0, 0, 0)
        self.edges = edges(conv, shape[2:])
        before, after = self.edges[::2][::-1], self.edges[1::2][::-1]  # of height and width
        if conv.dilation == (1, 1) and all(0 <= b <= a for b, a in zip(before, after, strict=True)):
            # The kernel gets zero rows at the top and zero columns on the left, so that the padding becomes symmetric:
            # oneDNN then pads by itself, without a copy of the input.
            (top, left), padding = (a - b for b, a in zip(before, after, strict=True)), list(after)
            self.zeros, self.edges = (left, 0, top, 0), (0, 0, 0, 0)
        else:
            padding = [0, 0]
        self.arguments: tuple[Any, ...] = (padding, list(conv.stride), list(conv.dilation), conv.groups)
        left, right, top, bottom = self.edges
        self.padded = (*shape[:2], shape[2] + top + bottom, shape[3] + left + right)
        self.post = POST_OPS[type(of.act)]
        self.take(conv)

    def take(self, conv: nn.Conv2d) -> None:
        """Use the weights of a convolution, reordered for oneDNN."""
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # its stub lacks the last argument
        weight = F.pad(conv.weight.detach(), self.zeros)
        packed = reorder(weight.bfloat16().to_mkldnn(), *self.arguments, self.padded)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().bfloat16(), requires_grad=False)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        """Activations (B, O, H', W') in bfloat16; arguments as for `ConvAct`."""
        x = x.bfloat16()
        if any(self.edges):
            x = F.pad(x, self.edges)
        convolved = torch.ops.mkldnn._convolution_pointwise
        if other is None:
            return convolved(x, self.weight, self.bias, *self.arguments, *self.post, "")
        act = None if self.post[0] == "none" else self.post[0]
        rest = (self.weight, self.bias, *self.arguments, "add", 1, act, self.post[1], "")
        if self.into:
            return torch.ops.mkldnn._convolution_pointwise_.binary(other.bfloat16(), x, *rest)
        return convolved.binary(x, other.bfloat16(), *rest)


def frozen_copy(network: nn.Module, images: torch.Tensor, earlier: nn.Module | None = None) -> nn.Module:
    """A copy of a network that predicts the same, faster, and cannot be trained.

    In the copy each chain of calls (`unfreeze.acceleration.conv_chains`) is fused into one. A copy whose output
    differs from the network's is discarded.

    Args:
        network: maps the images to one tensor; the copy predicts what the network predicts in eval mode.
        images: (B, 3, S, S) normalised, on the network's device: a batch of the size that the copy is for. The
            network is run on two of them.
        earlier: a copy that this function made of the same network, for batches of the same size. It is returned with
            updated weights, which takes less time than a new copy.

    Returns:
        The copy in eval mode without gradients; the network itself if it is such a copy already, or has no
        convolutions.
    """
    if earlier is not None and _refreshed(earlier, network):
        return earlier
    kinds = {type(module) for module in network.modules()}
    if FROZEN in getattr(network, "meta", {}) or not any(issubclass(kind, nn.Conv2d) for kind in kinds):
        return network
    batch, images = len(images), images[:2].float()
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False), _full_precision():
        copied = _eval_copy(network)
        expected = deterministically(lambda: copied(images))
        folded = traced(copied, images, trains=False)
        if folded is None:
            return _eval_copy(network)
        shapes, folded.meta[FROZEN] = _fold(folded)
        found = folded(images)
    if not torch.allclose(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max())):
        logger.info("The folded network predicts something else: the original network is used, which takes longer")
        return _eval_copy(network)
    dtype = precision(images.device)
    if dtype == torch.float32:
        return folded
    if images.device.type == "cpu" and dtype == torch.bfloat16 and fused_convolutions_work():
        for name, (count, *shape) in shapes.items():
            joined: Any = folded.get_submodule(name)
            folded.set_submodule(name, OneDNNConvAct(joined, (count * batch // len(images), *shape)))
    for module in folded.modules():
        if type(module) in (nn.Conv2d, nn.Linear):  # but no subclass, which may need full precision
            module.weight.data = module.weight.data.to(dtype)  # as autocast would, but once
    return folded


@cache
def fused_convolutions_work() -> bool:
    """Whether `OneDNNConvAct` computes what `ConvAct` does: torch may change its private operators in any version."""
    with torch.random.fork_rng(devices=[]):
        public = ConvAct(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()).requires_grad_(False)
        images, other = torch.randn(2, 2, 16, 8, 8)
    try:
        fused = OneDNNConvAct(public, tuple(images.shape))
        for found, expected in (
            (fused(images), public(images)),
            (fused(images, other), public(images, other)),
        ):
            torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.05)
    except (AssertionError, AttributeError, RuntimeError, TypeError) as error:
        logger.warning(
            "oneDNN's fused convolutions do not work in torch %s, so frozen layers take longer: %s",
            torch.__version__,
            str(error).partition("\n")[0],
        )
        return False
    return True


def _refreshed(copied: nn.Module, network: nn.Module) -> bool:
    """Update a copy's weights to the network's; False if it is not a folded copy, or the network lacks some of them."""
    sources: Sources | None = getattr(copied, "meta", {}).get(FROZEN)
    if sources is None:
        return False
    plain = _eval_copy(network)
    there = dict(itertools.chain(plain.named_parameters(), plain.named_buffers()))
    here = dict(itertools.chain(copied.named_parameters(), copied.named_buffers()))
    others = {name: tensor for name, tensor in here.items() if name.split(".")[0] not in sources}
    if not others.keys() <= there.keys():
        return False
    with torch.no_grad():
        for name, tensor in others.items():
            tensor.copy_(there[name])
        for name, (conv_name, norm_name) in sources.items():
            conv: Any = plain.get_submodule(conv_name)
            norm: Any = None if norm_name is None else plain.get_submodule(norm_name)
            target: Any = copied.get_submodule(name)
            target.take(conv if norm is None else fuse_conv_bn_eval(conv, norm))
    return True


def _full_precision() -> AbstractContextManager[None]:
    """Disable TF32: with it, convolutions of a deep network differ by about as much as `TOLERANCE` allows."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def _eval_copy(network: nn.Module) -> nn.Module:
    # `train` first: it clears results that some attention modules cached in eval mode, with earlier weights.
    plain = copy.deepcopy(network).train().eval().requires_grad_(False)
    for name, module in list(plain.named_modules()):
        StandIn.take_back(module)
        if isinstance(module, _BatchNorm) and isinstance(getattr(module, "act", None), nn.Module):
            plain.set_submodule(name, _split(module))  # timm's BatchNorm with drop and activation inside
    return plain


def _fold(graph: fx.GraphModule) -> tuple[dict[str, tuple[int, ...]], Sources]:
    """Replace each chain of a traced network by one call of a `ConvAct`; the BatchNorm is folded into the convolution.

    Returns:
        Shape (B, C, H, W) of the input of each `ConvAct`, by its name; and the modules that it replaces.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    sources: Sources = {}
    for chain in chains(graph):
        conv = chain.conv if chain.norm is None else fuse_conv_bn_eval(chain.conv, chain.norm)
        name, inputs = f"chain_{len(shapes)}", tuple(chain.inputs)
        shapes[name] = inputs[0].meta["shape"]
        targets = [str(call.target) for call in chain.calls]
        sources[name] = targets[0], targets[1] if chain.norm is not None else None
        graph.add_submodule(name, ConvAct(conv, chain.act or nn.Identity()))
        with graph.graph.inserting_before(chain.calls[-1]):
            call = graph.graph.call_module(name, inputs)
        chain.calls[-1].replace_all_uses_with(call, propagate_meta=True)
        for done in reversed(chain.calls):
            graph.graph.erase_node(done)
    _overwrite(graph, {call: turn for turn, call in enumerate(graph.graph.nodes) if call.target in shapes})
    graph.recompile()
    graph.delete_all_unused_submodules()
    return shapes, sources


def _overwrite(graph: fx.GraphModule, turns: dict[fx.Node, int]) -> None:
    """Let an addition write its result into the memory of the added tensor, where this is safe (`ConvAct.into`).

    It is safe if a `ConvAct` or a max pooling made the tensor, and its other users are `ConvAct`s that run earlier.

    Args:
        graph: the traced copy.
        turns: for each call of a `ConvAct`, its position in the order of execution.
    """
    modules = dict(graph.named_modules())
    made = {node for node in graph.graph.nodes if isinstance(modules.get(str(node.target)), ConvAct | nn.MaxPool2d)}
    for call in turns:
        other = call.all_input_nodes[-1]
        if len(call.args) == 2 and other in made and other is not call.args[0]:
            module: Any = graph.get_submodule(str(call.target))
            module.into = all(turns.get(user, math.inf) <= turns[call] for user in other.users)


def _split(module: Any) -> nn.Sequential:
    device = module.running_mean.device
    norm = nn.BatchNorm2d(module.num_features, module.eps, module.momentum, module.affine, device=device)
    norm.load_state_dict(module.state_dict())
    return nn.Sequential(norm, *(part for part in (module.drop, module.act) if type(part) is not nn.Identity)).eval()
