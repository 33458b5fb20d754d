"""Setup of all tests: few threads, no telemetry. Fixtures for an unprivileged user and for mounted file systems."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # read at the first import of mlflow, in any test
os.environ.setdefault("OMP_NUM_THREADS", "1")  # because several tests run in parallel


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder that everyone can access. If the tests run as root, this test runs as the user nobody instead."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            if root:
                os.seteuid(0)


@pytest.fixture
def native_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in bfloat16 on the CPU. Skips the test if the processor has neither AMX nor AVX512-BF16."""
    import torch

    if not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        pytest.skip("a processor without native bfloat16")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)


@pytest.fixture
def mounted() -> Iterator[Callable[..., None]]:
    """Function that mounts a file system until the end of the test. Skips the test if mounting is not allowed."""
    done: list[str] = []

    def mount(folder: Path, *how: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if (
            shutil.which("mount") is None
            or subprocess.run(["mount", *how, str(folder)], capture_output=True).returncode
        ):
            pytest.skip("no right to mount a file system")
        done.append(str(folder))

    yield mount
    for folder in reversed(done):
        subprocess.run(["umount", "-l", folder], check=True)
