"""Cost of checkpoints: the time to write one, as a share of all time at the default interval."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.ours import WHOLE
from benchmarks.work import Work, classifier
from unfreeze.training.checkpoints import Checkpoint, Progress
from unfreeze.training.history import History
from unfreeze.training.loop import make_optimizer, set_rate
from unfreeze.training.phases import unfrozen
from unfreeze.training.state import trainable_state
from unfreeze.training.train_step import train_batch

ITERATIONS = 20_000
"""Number of history rows in the checkpoint, as after a long training."""


def measure(work: Work, say: Callable[[str], None], repeats: int = 5) -> dict[str, Any]:
    """Seconds to write a checkpoint (whole network, optimizer state, best weights) and to flush it to disk."""
    model, loader = classifier(work, seed=0)
    rows = loader.packed.rows("train")[: loader.batch_size]
    with unfrozen(model, loader, rows, WHOLE) as groups:
        optimizer = make_optimizer(groups, work.settings.train)
        set_rate(optimizer, 1e-5)
        train_batch(model, optimizer, next(loader.plain(rows)), nn.CrossEntropyLoss())
        weights = trainable_state(model)
    history = [{"iteration": i, "rate": 1e-3, "loss": 0.5} for i in range(ITERATIONS)]
    best = {name: torch.clone(tensor) for name, tensor in weights.items()}
    progress = Progress(iteration=ITERATIONS, history=History(batches=history), best=best)
    seconds, interval = [], work.settings.checkpoint.seconds
    with tempfile.TemporaryDirectory(dir=".") as folder:  # on the project's disk
        checkpoint = Checkpoint(Path(folder) / "training.safetensors", "key", interval)
        for _ in range(repeats):
            start = time.perf_counter()
            checkpoint.save(weights, optimizer, progress)
            seconds.append(time.perf_counter() - start)
        megabytes = checkpoint.path.stat().st_size / 1e6
    share = median(seconds) / (interval + median(seconds))
    say(
        f"a checkpoint of {megabytes:.0f} MB: {median(seconds):.2f} s, {share:.2%} of the time with one every {interval:.0f} s"
    )
    return {"megabytes": megabytes, "seconds": seconds, "share": share}
