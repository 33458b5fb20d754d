"""Devices for tests of the library: the CPU, and a GPU if there is one."""

import pytest
import torch

NEEDS_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NEEDS_NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
DEVICES = pytest.mark.parametrize(
    "device",
    [
        pytest.param(torch.device("cpu"), id="device_cpu"),
        pytest.param(
            torch.device("cuda"),
            id="device_cuda",
            marks=NEEDS_A_GPU,
        ),
    ],
)
