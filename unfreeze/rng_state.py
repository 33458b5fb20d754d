"""The state of every source of chance, as tensors: to put it back after a trial, or to take up a training where it was."""

import random
from typing import Any

import numpy as np
import torch

State = dict[str, torch.Tensor]


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
