"""What all tests share: few threads, no telemetry; being nobody; file systems of their own."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # read when mlflow is imported, by whichever test comes first
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as several tests run at once


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder to which everyone has access; the test has the rights of nobody, where it would have those of root."""
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
def mounted() -> Iterator[Callable[..., None]]:
    """Mounts file systems, where the tests may do that; they are gone afterwards."""
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
