"""Peak resident memory of an epoch against the number of packed images: it must not grow with them."""

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
SIZE = 160
"""Shorter side in pixels of the images, which are square."""


def measure(say: Callable[[str], None], counts: tuple[int, ...] = COUNTS) -> dict[str, Any]:
    """Peak resident megabytes of reading one augmented epoch, for made-up sets of each size.

    Every set is read by a new process, as a step of the recipe is.
    """
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            _make(Path(folder), count)
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                found[str(count)] = pool.submit(_epoch, Path(folder)).result()
            say(f"{count:,} packed images: {found[str(count)]:.0f} MB")
    return {"image_size": SIZE, "peak_mb": found, "growth_mb": max(found.values()) - min(found.values())}


def _make(folder: Path, count: int) -> None:
    """A packed set of random pixels, in the layout of `unfreeze.packing`."""
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
            "average_hash": [f"{i:016x}" for i in numbers],
            "reason": "",
        }
    )
    table.to_csv(folder / "images.csv", index=False)
    about = {"classes": ["class 0", "class 1"], "image_size": SIZE, "source": "made up", "fingerprint": ""}
    (folder / "dataset.json").write_text(json.dumps(about))


def _epoch(folder: Path) -> float:
    import torch

    from unfreeze.batches import Loader, Normalisation
    from unfreeze.device import keep_memory
    from unfreeze.packed import open_packed
    from unfreeze.settings import Augment

    keep_memory()
    packed = open_packed(folder)
    norm = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    loader = Loader(packed, norm, torch.device("cpu"), 64)
    augment = Augment("horizontal", 10.0, 1.1, 0.1)
    for _ in loader.augmented(packed.rows("train"), augment, 0, 0):
        pass
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6
