"""Checkpoints of a training: all that it takes to go on in the middle of an epoch as if nothing had happened.

A checkpoint is one safetensors file: what trains, the optimizer's state, the best cycle's weights, every source of chance,
and how far the training has come. It is written beside the last one, flushed to the disk and put in its place, and the
one before is kept: whatever moment the power fails at, one of the two is whole. A checksum tells which. The key says what
the training depends on, so that other settings, images or code never go on from it.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unfreeze.models.weights import checksum
from unfreeze.persistence.atomic import sync
from unfreeze.persistence.interruption import SHARE, Interrupted, Interruption
from unfreeze.training.history import History
from unfreeze.training.state import Tensors, put, rng_state, set_rng_state

logger = logging.getLogger("unfreeze")

COLUMNS = ("rate", "loss", "starting")
"""What a history's batches have beside their iteration; ``starting`` only in an LR range test."""


@dataclass
class Progress:
    """How far a training has come, beside what model and optimizer know.

    Attributes:
        epoch: number of the epoch, from 0.
        batch: the epoch's next batch, from 0.
        iteration: the next batch of all, from 0.
        history: what happened so far.
        best: weights of the history's best cycle, where they are not simply the newest.
        done: there is nothing left to train.
    """

    epoch: int = 0
    batch: int = 0
    iteration: int = 0
    history: History = field(default_factory=History)
    best: Tensors = field(default_factory=dict)
    done: bool = False


@dataclass
class Checkpoint:
    """Where one training keeps its checkpoints, and when.

    Attributes:
        path: the file; the one before it is kept as ``<path>.before``.
        key: what the training depends on, in a word; files with another key are not read.
        seconds: time between two checkpoints, more where they would take over 2 % of it.
        batches: number of batches between two, or None for the time alone.
        interruption: a wish to stop, which is granted after the next checkpoint.
        written: called after each checkpoint that was written.
    """

    path: Path
    key: str
    seconds: float
    batches: int | None = None
    interruption: Interruption = field(default_factory=Interruption)
    written: Callable[[], None] = lambda: None
    _last: float = field(default_factory=time.monotonic)
    _cost: float = 0.0
    _since: int = 0

    def due(self) -> bool:
        """Whether to write a checkpoint after the batch that was just trained on."""
        self._since += 1
        if self.interruption.asked or (self.batches and self._since >= self.batches):
            return True
        return time.monotonic() - self._last >= max(self.seconds, self._cost / SHARE)

    def save(self, weights: Tensors, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Write a checkpoint, whole or not at all.

        Args:
            weights: what training changes in the model, as `trainable_state` gives it.
            optimizer: over it.
            progress: how far the training has come.

        Raises:
            Interrupted: a wish to stop was waiting for this.
        """
        start = time.monotonic()
        try:
            self._write(_tensors(weights, optimizer, progress), _numbers(progress))
            self.written()
        except OSError as error:
            with suppress(OSError):  # half a checkpoint takes space that is missing already
                _partial(self.path).unlink(missing_ok=True)
            logger.warning("No checkpoint: %s: %s. The training goes on.", self.path, error.strerror)
        self._last, self._since = time.monotonic(), 0
        self._cost = self._last - start
        if self.interruption.asked:
            raise Interrupted

    def load(self, weights: Tensors, optimizer: torch.optim.Optimizer) -> Progress | None:
        """Put weights, optimizer and chance into the state of the newest sound checkpoint.

        Returns:
            How far the training had come; None where there is no checkpoint to go on from.
        """
        for path in (self.path, _before(self.path)):
            if not path.exists():
                continue
            try:
                tensors, numbers = _read(path, self.key)
                return _restore(weights, optimizer, tensors, numbers)
            except _Refused as refused:
                logger.warning("%s is not used: %s.", path, refused)
        return None

    def take(self, other: Path) -> bool:
        """Go on from a checkpoint that another machine has written, if it is sound, of this training, and further.

        Args:
            other: the file, on the same disk; it is moved.

        Returns:
            Whether it is the newest one now.
        """
        if max(self._reached(self.path), self._reached(_before(self.path))) >= self._reached(other):
            return False
        os.replace(other, self.path)
        sync(self.path.parent)
        return True

    def _reached(self, path: Path) -> tuple[int, int, bool]:
        """How far a file's training had come; less than nothing where it is not to be gone on from."""
        try:
            at = _read(path, self.key)[1]["position"]
        except _Refused:
            return -1, -1, False
        return at["iteration"], at["epoch"], at["done"]

    @contextmanager
    def deferring(self, defers: bool = True) -> Iterator[None]:
        """A wish to stop waits for the next checkpoint while the block runs; or, within such a block, is granted at once."""
        before, self.interruption.deferred = self.interruption.deferred, defers
        try:
            yield
        finally:
            self.interruption.deferred = before

    def _write(self, tensors: Tensors, numbers: Mapping[str, Any]) -> None:
        from safetensors.torch import save

        text = json.dumps(numbers)
        content = save(tensors, {"key": self.key, "numbers": text, "checksum": checksum(tensors, text)})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(self.path)
        partial.write_bytes(content)
        sync(partial)
        if self.path.exists():
            os.replace(self.path, _before(self.path))
        os.replace(partial, self.path)
        sync(self.path.parent)


class _Refused(Exception):
    """A checkpoint that is not to be gone on from, and why."""


def _tensors(weights: Tensors, optimizer: torch.optim.Optimizer, progress: Progress) -> Tensors:
    tensors = {f"weights/{name}": tensor for name, tensor in weights.items()}
    tensors |= {f"best/{name}": tensor for name, tensor in progress.best.items()}
    tensors |= {f"rng/{name}": tensor for name, tensor in rng_state().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{number}/{name}": tensor for name, tensor in state.items() if tensor is not None}
    for name in COLUMNS:
        column = [row[name] for row in progress.history.batches if name in row]
        tensors[f"batches/{name}"] = torch.tensor(column, dtype=torch.float64)
    # A copy of each: safetensors refuses tensors that share memory, as a buffer and its best may.
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _numbers(progress: Progress) -> dict[str, Any]:
    position = {name: getattr(progress, name) for name in ("epoch", "batch", "iteration", "done")}
    return {"position": position, "epochs": progress.history.epochs, "best_cycle": progress.history.best_cycle}


def _restore(
    weights: Tensors, optimizer: torch.optim.Optimizer, tensors: Tensors, numbers: Mapping[str, Any]
) -> Progress:
    parts: dict[str, Tensors] = {"weights": {}, "best": {}, "rng": {}, "optimizer": {}, "batches": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = tensor
    if _shapes(parts["weights"]) != _shapes(weights):
        raise _Refused("it is of another network")
    put(weights, parts["weights"])
    _restore_optimizer(optimizer, parts["optimizer"])
    set_rng_state(parts["rng"])
    columns = {name: column for name in COLUMNS if (column := parts["batches"][name].tolist())}
    rows = [
        {"iteration": i, **dict(zip(columns, values, strict=True))}
        for i, values in enumerate(zip(*columns.values(), strict=True))
    ]
    best = {name: torch.empty_like(weights[name]).copy_(tensor) for name, tensor in parts["best"].items()}
    return Progress(history=History(rows, numbers["epochs"], numbers["best_cycle"]), best=best, **numbers["position"])


def _shapes(tensors: Tensors) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    state: dict[int, Tensors] = {}
    for name, tensor in tensors.items():
        number, _, rest = name.partition("/")
        state.setdefault(int(number), {})[rest] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    # In the layout of their parameters: fused optimizers walk through the memory of all of them side by side.
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _read(path: Path, key: str) -> tuple[Tensors, dict[str, Any]]:
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise _Refused(f"it is damaged ({str(error).splitlines()[0]})") from None
    if meta.get("checksum") != checksum(tensors, meta.get("numbers", "")):
        raise _Refused("it is damaged (its checksum is wrong)")
    if meta.get("key") != key:
        raise _Refused("it was made with other settings, images or code, or on another device")
    return tensors, json.loads(meta["numbers"])


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _before(path: Path) -> Path:
    return path.with_name(path.name + ".before")
