"""Try something on a model and leave no trace: weights, optimizer and chance are as before afterwards."""

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from unfreeze.rng_state import rng_state, set_rng_state


@contextmanager
def preserved(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Restore everything that training changes when the block ends, also when it ends with an exception.

    That is: parameters and buffers (BatchNorm statistics among them), what of them trains, gradients, the optimizer's
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
