"""The state of a training: trained weights and random state, and how to restore them after a trial run."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

Tensors = dict[str, torch.Tensor]


@contextmanager
def restored(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Restore weights, buffers, optimizer and random state when the block ends.

    Every tensor stays at its address, which a CUDA graph refers to. Optimizer state that was created in the block is
    set to 0, its initial value.
    """
    tensors = [*model.parameters(), *model.buffers()]
    kept = [tensor.detach().clone() for tensor in tensors]
    before = {p: {k: v.clone() for k, v in state.items() if torch.is_tensor(v)} for p, state in optimizer.state.items()}
    chance = rng_state()
    wait = torch.cuda.synchronize if tensors[0].is_cuda else lambda: None
    wait()  # the block may work on another stream, which does not wait for the copies
    try:
        yield
    finally:
        wait()
        with torch.no_grad():
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    if torch.is_tensor(value):
                        old = before.get(parameter, {}).get(name)
                        value.zero_() if old is None else value.copy_(old)
        wait()
        set_rng_state(chance)


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


def rng_state() -> Tensors:
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


def set_rng_state(state: Tensors) -> None:
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
