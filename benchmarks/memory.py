"""Peak resident memory of training on packed images against their number: it must not grow with them."""

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
"""Shorter side in pixels of the images, which are square."""


def measure(say: Callable[[str], None], counts: tuple[int, ...] = COUNTS) -> dict[str, Any]:
    """Peak resident megabytes of reading augmented batches, for made-up sets of each size.

    Every set is read by a new process, as a step of the recipe is, and as often as it takes for as many batches as an epoch
    of the largest has: the memory that batches are kept in takes a few hundred of them to come to its size.
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
    """A packed set of random pixels, in the layout of `unfreeze.data.packing`."""
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
    """Bytes that this process has had in memory at most."""
    status = Path("/proc/self/status")
    if status.exists():  # what `resource` says counts the process that started this one, too
        return 1024 * int(next(line for line in status.read_text().splitlines() if "VmHWM" in line).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
