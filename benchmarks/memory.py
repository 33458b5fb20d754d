"""Peak resident memory of reading training batches: it must not grow with the number of packed images."""

import json
import resource
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

COUNTS = (1_000, 10_000, 100_000)
BATCH = 64
SIZE = 160
"""Side of the square images in pixels."""


def measure(say: Callable[[str], None], counts: tuple[int, ...] = COUNTS) -> dict[str, Any]:
    """Peak resident megabytes of reading augmented batches, for synthetic sets of each size.

    Each set is read by a new process, as in the steps of the recipe. For every set, the number of batches is that of an
    epoch of the largest set, because memory reaches its full size only after a few hundred batches.
    """
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            _make(Path(folder), count)
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                found[str(count)] = pool.submit(_read, Path(folder), max(counts) // BATCH).result()
            say(f"{count:,} packed images: {found[str(count)]:.0f} MB")
    return {"image_size": SIZE, "peak_mb": found, "growth_mb": max(found.values()) - min(found.values())}


def _make(folder: Path, count: int) -> None:
    """Write a packed set of random pixels, in the layout of `unfreeze.data.packing`."""
    bytes_each = SIZE * SIZE * 3
    block = np.random.default_rng(0).integers(0, 256, bytes_each * 100, dtype=np.uint8).tobytes()
    with (folder / "pixels.bin").open("wb") as file:
        for _ in range(count // 100):
            file.write(block)
    numbers = np.arange(count)
    table = pd.DataFrame(
        {
            "path": [f"class {i % 2}/{i:07}.jpg" for i in numbers],
            "label": [f"class {i % 2}" for i in numbers],
            "split": "train",
            "group": "",
            "width": SIZE,
            "height": SIZE,
            "packed_width": SIZE,
            "packed_height": SIZE,
            "offset": numbers * bytes_each,
            "digest": [f"{i:032x}" for i in numbers],
            "difference_hash": [f"{i:016x}" for i in numbers],
            "reason": "",
        }
    )
    table.to_csv(folder / "images.csv", index=False)
    about = {"classes": ["class 0", "class 1"], "image_size": SIZE, "source": "made up", "fingerprint": ""}
    (folder / "dataset.json").write_text(json.dumps(about))


def _read(folder: Path, batches: int) -> float:
    from itertools import chain, count, islice

    import torch

    from unfreeze.batches.loader import Loader, Normalisation
    from unfreeze.data.packed import open_packed
    from unfreeze.device import keep_memory
    from unfreeze.settings.schema import Augment

    keep_memory()
    packed = open_packed(folder)
    norm = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    loader = Loader(packed, norm, torch.device("cpu"), BATCH)
    augment = Augment("horizontal", 10.0, 1.1, 0.1)
    rows = packed.rows("train")
    epochs = (loader.augmented(rows, augment, 0, epoch) for epoch in count())
    for _ in islice(chain.from_iterable(epochs), batches):
        pass
    return _peak() / 1e6


def _peak() -> int:
    """Peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # the value of `resource` includes the parent process
        return 1024 * int(next(line for line in status.read_text().splitlines() if "VmHWM" in line).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
