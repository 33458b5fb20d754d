"""The state of a training: trained weights and random state, and how to restore them after a trial run."""

import copy
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

Tensors = dict[str, torch.Tensor]


State = dict[str, torch.Tensor]


@contextmanager
def preserved(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Restore everything that training changes when the block ends, also when it ends with an exception.

    That is: parameters and buffers (including BatchNorm statistics), ``requires_grad``, gradients, the optimizer's
    state and rates, training or eval mode of every module, and the random state of Python, NumPy and torch on every
    device.

    Args:
        model: the model that is tried out.
        optimizer: over its parameters.
    """
    # By name and not by state_dict, which leaves out the buffers that are not saved with the weights.
    state = {name: tensor.detach().clone() for name, tensor in _tensors(model)}
    parameters = [(p, p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    before = rng_state()
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in _tensors(model):
                tensor.copy_(state[name])
        for parameter, trains, gradient in parameters:
            parameter.requires_grad_(trains)
            parameter.grad = gradient
        for module, training in modes:
            module.training = training
        optimizer.load_state_dict(optimizer_state)
        set_rng_state(before)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())


def trainable_state(model: nn.Module) -> Tensors:
    """Tensors that training changes in a model: trainable parameters, and buffers of modules in training mode.

    The tensors are the model's own, which training changes in place. Call it while the model is in training mode.
    """
    tensors: Tensors = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    for prefix, module in model.named_modules():
        if module.training:
            tensors |= {
                f"{prefix}.{name}" if prefix else name: buffer for name, buffer in module.named_buffers(recurse=False)
            }
    return tensors


def put(weights: Tensors, new: Tensors) -> None:
    """Copy tensors into the weights of the same name, which keep their layout in memory."""
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(new[name])


def rng_state() -> State:
    """The random state of Python, NumPy and torch on every device that is in use."""
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)
    state = {
        "python": torch.tensor([version, *words]),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*numpy["state"]["key"].tolist(), numpy["state"]["pos"], numpy["has_gauss"]]),
        "numpy_gauss": torch.tensor([numpy["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return state | {f"cuda:{i}": device for i, device in enumerate(devices)}


def set_rng_state(state: State) -> None:
    """Put back what `rng_state` returned. States of devices that are not there are left out."""
    version, *words = state["python"].tolist()
    random.setstate((version, tuple(words), *(state["python_gauss"].tolist() or [None])))
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, *state["numpy_gauss"].tolist()))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda:{i}" in state:
                torch.cuda.set_rng_state(state[f"cuda:{i}"], i)
