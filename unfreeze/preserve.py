"""Try something on a model and leave no trace: weights, optimizer and chance are as before afterwards."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def preserved(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Restore everything that training changes when the block ends, also when it ends with an exception.

    That is: parameters and buffers (BatchNorm statistics among them), gradients, the optimizer's state and rates,
    training or eval mode of every module, and the random state of Python, NumPy and torch on every device.

    Args:
        model: the model that is tried out.
        optimizer: over its parameters.
    """
    state = copy.deepcopy(model.state_dict())
    gradients = [(p, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    chance = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = [torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())]
    try:
        yield
    finally:
        model.load_state_dict(state)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training
        optimizer.load_state_dict(optimizer_state)
        random.setstate(chance[0])
        np.random.set_state(chance[1])
        torch.set_rng_state(chance[2])
        for i, device_state in enumerate(devices):
            torch.cuda.set_rng_state(device_state, i)
