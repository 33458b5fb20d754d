"""Analyse a network's convolutions: the operations that follow each one, and its padding."""

import dataclasses
import operator
from typing import Any, TypeGuard

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

POST_OPS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.Identity: ("none", []),
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
    nn.Hardswish: ("hardswish", []),
}
"""Activations that oneDNN can fuse into a convolution, with oneDNN's name and scalars for each."""

TOLERANCE = 1e-3
"""Largest allowed error of a faster version, as a share of the network's largest output value in full precision."""

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
"""Functions and tensor methods that a residual block may use to add its input to its output."""


@dataclasses.dataclass
class Chain:
    """Consecutive calls of a `traced` network whose intermediate results are used nowhere else.

    Attributes:
        calls: the convolution, then in this order, each at most once: a BatchNorm, the addition of a tensor of the same
            shape, an activation.
        conv: the convolution, which uses its weights unchanged.
        norm: the BatchNorm, which has running statistics.
        act: the activation, of a type in `POST_OPS`; after an addition a ReLU.
        adds: whether there is an addition.
    """

    calls: list[fx.Node]
    conv: nn.Conv2d
    norm: _BatchNorm | None = None
    act: nn.Module | None = None
    adds: bool = False

    @property
    def inputs(self) -> list[fx.Node]:
        """Inputs: the convolution's input and, if there is an addition, the tensor that is added."""
        given = [node for call in self.calls for node in call.all_input_nodes]
        return [node for node in given if node not in self.calls]


def traced(network: nn.Module, images: torch.Tensor, trains: bool) -> fx.GraphModule | None:
    """Trace a network with `torch.fx`: the graph of the calls that it makes, the same for all images.

    Args:
        network: in eval mode.
        images: (B, 3, S, S), on which the traced network is run once to record shapes.
        trains: whether to keep calls that do nothing in eval mode but may in training, such as dropout.

    Returns:
        A module that uses the network's own modules, with the ``shape`` of each call's output in the call's ``meta``.
        None if the network cannot be traced, for example because its calls depend on the images.
    """
    try:
        graph = fx.GraphModule(network, _Tracer().trace(network))
        seen = _Seen(graph)
        seen.run(images)
    except Exception:  # of any kind: the network's own code runs on proxies instead of tensors
        return None
    for call in seen.idle:
        if not trains or type(called(graph, call)) is nn.Identity:
            call.replace_all_uses_with(call.all_input_nodes[0])
            graph.graph.erase_node(call)
    return graph


class _Tracer(fx.Tracer):
    """Tracer that enters modules with submodules, except BatchNorms and those that timm marks as not traceable."""

    def __init__(self) -> None:
        from timm.layers import get_notrace_functions, get_notrace_modules

        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self._closed = (_BatchNorm, *get_notrace_modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._closed) or not any(True for _ in m.children())


class _Seen(fx.Interpreter):
    """Records the shapes of calls' results, and which calls return their input unchanged."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.idle: list[fx.Node] = []

    def run_node(self, n: fx.Node) -> Any:
        given = [self.env[node] for node in n.all_input_nodes]
        versions = [tensor._version for tensor in given if isinstance(tensor, torch.Tensor)]
        made = super().run_node(n)
        if isinstance(made, torch.Tensor):
            n.meta["shape"] = tuple(made.shape)
            if n.op == "call_module" and len(given) == 1 and made is given[0] and [made._version] == versions:
                self.idle.append(n)
        return made


def called(graph: fx.GraphModule, call: fx.Node) -> nn.Module | None:
    """The called module, or None if the call is not of a module."""
    return graph.get_submodule(str(call.target)) if call.op == "call_module" else None


def chains(graph: fx.GraphModule) -> list[Chain]:
    """The chains of a `traced` network; each call is in at most one chain."""
    found: list[Chain] = []
    for call in graph.graph.nodes:
        conv = called(graph, call)
        if plain(conv):
            chain = Chain([call], conv)
            while _lengthened(chain, graph, found):
                pass
            found.append(chain)
    return found


def _lengthened(chain: Chain, graph: fx.GraphModule, others: list[Chain]) -> bool:
    """Append the only user of a chain's result to the chain, if possible; returns whether it was appended."""
    users = list(chain.calls[-1].users)
    if len(users) != 1:
        return False
    [user] = users
    module, alone = called(graph, user), chain.act is None and not chain.adds
    if isinstance(module, _BatchNorm) and module.track_running_stats and alone and chain.norm is None:
        chain.norm = module
    elif _adds(user) and alone and all(user not in other.calls for other in others):
        chain.adds = True
    elif type(module) in (POST_OPS if alone else (nn.ReLU,)) and chain.act is None:
        chain.act = module
    else:
        return False
    chain.calls.append(user)
    return True


def _adds(call: fx.Node) -> bool:
    """Whether a call adds two tensors of one shape, and nothing else."""
    shapes = [node.meta.get("shape") for node in call.all_input_nodes]
    if call.op == "call_module" or call.target not in ADDITIONS or call.kwargs:
        return False
    return len(shapes) == 2 and None is not shapes[0] == shapes[1]


def plain(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Whether a module is a convolution that uses its weights unchanged; some classes standardise them first."""
    from timm.layers import Conv2dSame

    if not isinstance(module, nn.Conv2d) or type(module) not in (nn.Conv2d, Conv2dSame):
        return False
    return module.padding_mode == "zeros" and "forward" not in vars(module)


def edges(conv: nn.Conv2d, size: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Zero padding of the convolution for an image of this height and width: left, right, top, bottom."""
    if type(conv) is not nn.Conv2d:  # TensorFlow's "same" padding, with an odd row or column at the end
        needed = [
            max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            for n, s, k, d in zip(size, conv.stride, conv.kernel_size, conv.dilation, strict=True)
        ]
        (top, left), (height, width) = [n // 2 for n in needed], needed
        return left, width - left, top, height - top
    if isinstance(conv.padding, str):
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        return left, right, top, bottom
    top, left = conv.padding
    return left, left, top, top
