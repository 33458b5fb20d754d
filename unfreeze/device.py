"""Device, precision, seeds and memory."""

import contextlib
import ctypes
import logging
import os
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from unfreeze.errors import UserError

logger = logging.getLogger("unfreeze")

DRIVER = Path("/proc/driver/nvidia/version")
"""File that exists if an NVIDIA driver is loaded."""

T = TypeVar("T")
Model = TypeVar("Model", bound=nn.Module)


def choose_device(wanted: str) -> torch.device:
    """The device to compute on.

    Args:
        wanted: ``cuda``, ``cpu``, or ``auto``: CUDA if it works, else the CPU. If there is an NVIDIA driver, but CUDA
            does not work, a warning says why.

    Raises:
        UserError: CUDA is wanted and does not work; says why.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    reason = _why_no_cuda()
    if wanted == "cuda":
        raise UserError(f"device is cuda, but CUDA does not work here: {reason} Set device to auto or cpu, or fix it.")
    if DRIVER.exists():
        logger.warning("Computing on the CPU, as CUDA does not work: %s", reason)
    return torch.device("cpu")


def best_device() -> torch.device:
    """CUDA if it works, else the CPU."""
    return choose_device("auto")


def _why_no_cuda() -> str:
    """The reason why CUDA does not work, in one line."""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA."
    try:
        torch.cuda.init()
        return "there is no GPU (is CUDA_VISIBLE_DEVICES empty?)."
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0]


def describe(device: torch.device) -> str:
    """The device in words, for logs."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device.type})"
    return f"the CPU, {torch.get_num_threads()} threads"


def precision(device: torch.device) -> torch.dtype:
    """The dtype that a network computes in on a device: the fastest that it trains in.

    - bfloat16 on GPUs since Ampere, and on a CPU with AMX. AVX512-BF16 without AMX is not enough: a ResNet-34 then
      trains at 0.7 times the speed of float32 (benchmarks/notes/performance-history.md).
    - float16 on GPUs whose tensor cores have only float16 (V100, T4).
    - float32 on all others, where lower precision is emulated or slower.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            return torch.bfloat16
        return torch.float16 if capability >= (7, 0) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and torch.cpu._is_amx_tile_supported() else torch.float32


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """Mixed precision, if the device has it (`precision`)."""
    dtype = precision(device)
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def grad_scaler(device: torch.device) -> torch.amp.GradScaler:
    """The gradient scaler for training on a device: enabled for float16, in which small gradients would become zero."""
    return torch.amp.GradScaler(device.type, enabled=precision(device) == torch.float16)


def seed_everything(seed: int) -> None:
    """Make the rest of this process deterministic, bit for bit, on the same machine.

    Python, NumPy and torch are seeded; on a GPU, deterministic algorithms are required (`deterministically`).
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def deterministically(work: Callable[[], T]) -> T:
    """Run a function with the deterministic algorithms that `seed_everything` has required; returns its result.

    If torch raises an error because an operation has no deterministic implementation, the operation is logged, and the
    rest of this process runs with ``warn_only``, not guaranteed to be deterministic. The strict mode is tried first:
    with ``warn_only`` the backward pass of flash, memory-efficient and cuDNN attention is not deterministic.
    """
    try:
        return work()
    except RuntimeError as error:
        if "deterministic" not in str(error) or not torch.are_deterministic_algorithms_enabled():
            raise
        logger.warning(
            "Not repeatable bit for bit on this GPU: %s", str(error).split(", but you set")[0].splitlines()[0]
        )
        torch.use_deterministic_algorithms(True, warn_only=True)
        return work()


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Parameters of glibc's `mallopt`."""


def keep_memory() -> None:
    """Keep the memory that one batch frees for the next one, instead of handing it back to the system.

    glibc allocates the activations of a batch, which are megabytes each, from the system and returns them at once.
    Mapping and clearing their pages again took a quarter of an epoch's time on a CPU. Without glibc this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 64 * 2**20)


def to_device(model: Model, device: torch.device) -> Model:
    """Move a network to a device, in the memory layout that is fastest for convolutions."""
    if device.type == "cpu":
        keep_memory()
    return model.to(device).to(memory_format=torch.channels_last)
