"""How a network's convolutions work: what follows each, and the zeros around what it sees."""

from collections import Counter
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

POST_OPS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.Identity: ("none", []),
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
    nn.Hardswish: ("hardswish", []),
}
"""Activations that oneDNN computes within a convolution, under its names and with its scalars."""

TOLERANCE = 1e-3
"""Largest difference from the network's own activations in full precision that a faster way may make, as a share of the
largest."""

Chain = tuple[nn.Conv2d, _BatchNorm | None, nn.Module | None, tuple[int, ...]]


def chains(network: nn.Module, images: torch.Tensor) -> list[Chain]:
    """Convolutions with the BatchNorm and the activation that follow each (or None), and the shape of its input."""
    calls: Counter[nn.Module] = Counter()
    made_by: dict[tuple[int, int], list[Any]] = {}  # by id and version of a tensor, as some are added to in place
    alive: list[torch.Tensor] = []  # an id stays a tensor's own while the tensor lives

    def see(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if not isinstance(module, known):
            if isinstance(output, torch.Tensor) and inputs and output is inputs[0] and type(module) is not nn.Identity:
                made_by.pop((id(output), output._version), None)  # a dropout, which does something in training
            return
        calls[module] += 1
        version = inputs[0]._version - getattr(module, "inplace", False)  # before the module itself raised it
        chain = made_by.get((id(inputs[0]), version))
        if isinstance(module, nn.Conv2d):
            chain = [module, None, None, tuple(inputs[0].shape)]
            found.append(chain)
        elif chain is None or chain[2] is not None:
            return
        elif isinstance(module, _BatchNorm) and chain[1] is None and module.track_running_stats:
            chain[1] = module
        elif type(module) in POST_OPS:
            chain[2] = module
        else:
            return
        alive.append(output)
        made_by[id(output), output._version] = chain

    found: list[list[Any]] = []
    known = (nn.Conv2d, _BatchNorm, *(kind for kind in POST_OPS if kind is not nn.Identity))
    hooks = [module.register_forward_hook(see) for module in network.modules()]
    try:
        network(images)
    finally:
        for hook in hooks:
            hook.remove()
    # A module that is called in several places cannot be taken out of one.
    return [
        (conv, norm, act if calls[act] == 1 else None, shape)
        for conv, norm, act, shape in found
        if plain(conv) and calls[conv] == 1 and calls[norm] in (0, 1)
    ]


def plain(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a module is a convolution that computes with its weights as they are: some standardise them on the way."""
    from timm.layers import Conv2dSame

    own = "forward" in vars(module)
    return type(module) in (nn.Conv2d, Conv2dSame) and module.padding_mode == "zeros" and not own


def edges(conv: nn.Conv2d, size: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Zeros that the convolution puts around an image of this height and width: left, right, top, bottom."""
    if type(conv) is not nn.Conv2d:  # TensorFlow's way: as many as it takes, the odd one at the end
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
