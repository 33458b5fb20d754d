"""Checkpoints of a training, to resume it in the middle of an epoch with the same result, bit for bit.

A checkpoint is one safetensors file: trained weights and buffers, the states of the optimizer and of the gradient
scaler, the best cycle's weights, the random state, and the progress. A new checkpoint is written beside the last one,
flushed to disk and renamed, and the last one is kept: after a power loss at any moment, one of the two is complete, and
the checksums tell which. The key identifies what the training depends on, so that a checkpoint is not used with other
settings, images or code, or on another device.
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

Scaler = torch.amp.GradScaler
COLUMNS = ("rate", "loss", "starting")
"""Keys of a history's batches other than the iteration; ``starting`` only in an LR range test."""


@dataclass
class Progress:
    """Progress of a training, beside the state of model and optimizer.

    Attributes:
        epoch: number of the epoch, from 0.
        batch: number of the next batch in the epoch, from 0.
        iteration: number of the next batch over all epochs, from 0.
        history: losses and metrics so far.
        best: weights of the history's best cycle; empty if the newest weights are kept.
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
    """File and interval of one training's checkpoints.

    Attributes:
        path: the file; the previous one is kept as ``<path>.before``.
        key: identifies what the training depends on; files with another key are not read.
        seconds: time between two checkpoints; longer if checkpoints would take over 2 % of the time.
        batches: number of batches after which a checkpoint is written earlier; None if only the time counts.
        interruption: stop-request flag; the training stops after the next checkpoint.
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

    def save(
        self, weights: Tensors, optimizer: torch.optim.Optimizer, progress: Progress, scaler: Scaler | None = None
    ) -> None:
        """Write a checkpoint atomically.

        Args:
            weights: the tensors that training changes, as `trainable_state` returns them.
            optimizer: of these weights.
            progress: progress of the training.
            scaler: the gradient scaler, if there is one.

        Raises:
            Interrupted: a stop was requested; raised after the attempt to write the checkpoint.
        """
        start = time.monotonic()
        try:
            self._write(_tensors(weights, optimizer, progress), _numbers(progress, scaler))
            self.written()
        except OSError as error:
            with suppress(OSError):  # an incomplete checkpoint would only fill the disk further
                _partial(self.path).unlink(missing_ok=True)
            logger.warning("No checkpoint: %s: %s. The training goes on.", self.path, error.strerror)
        self._last, self._since = time.monotonic(), 0
        self._cost = self._last - start
        if self.interruption.asked:
            raise Interrupted

    def load(self, weights: Tensors, optimizer: torch.optim.Optimizer, scaler: Scaler | None = None) -> Progress | None:
        """Restore weights, optimizer, gradient scaler and random state from the newest valid checkpoint.

        Returns:
            Progress of the training; None if there is no valid checkpoint.
        """
        for path in (self.path, _before(self.path)):
            if not path.exists():
                continue
            try:
                tensors, numbers = _read(path, self.key)
                progress = _restore(weights, optimizer, tensors, numbers)
                if scaler is not None:
                    scaler.load_state_dict(numbers["scaler"])
                return progress
            except _Refused as refused:
                logger.warning("%s is not used: %s.", path, refused)
        return None

    def is_behind(self, other: Path) -> bool:
        """Whether another machine's checkpoint file is valid, belongs to this training, and has more progress."""
        return max(self._reached(self.path), self._reached(_before(self.path))) < self._reached(other)

    def take(self, other: Path) -> None:
        """Move another machine's checkpoint file, which is on the same disk, to `path`."""
        os.replace(other, self.path)
        sync(self.path.parent)

    def _reached(self, path: Path) -> tuple[int, int, bool]:
        """Progress of a checkpoint file, for comparison; lowest if the file cannot be used."""
        try:
            at = _read(path, self.key)[1]["position"]
        except _Refused:
            return -1, -1, False
        return at["iteration"], at["epoch"], at["done"]

    @contextmanager
    def deferring(self, defers: bool = True) -> Iterator[None]:
        """While the block runs, defer stop requests to the next checkpoint; with False, they interrupt at once."""
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
    """A checkpoint cannot be used; the message is the reason."""


def _tensors(weights: Tensors, optimizer: torch.optim.Optimizer, progress: Progress) -> Tensors:
    tensors = {f"weights/{name}": tensor for name, tensor in weights.items()}
    tensors |= {f"best/{name}": tensor for name, tensor in progress.best.items()}
    tensors |= {f"rng/{name}": tensor for name, tensor in rng_state().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{number}/{name}": tensor for name, tensor in state.items() if tensor is not None}
    for name in COLUMNS:
        column = [row[name] for row in progress.history.batches if name in row]
        tensors[f"batches/{name}"] = torch.tensor(column, dtype=torch.float64)
    # Cloned: safetensors refuses tensors that share memory, such as a buffer that belongs to two modules.
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _numbers(progress: Progress, scaler: Scaler | None) -> dict[str, Any]:
    position = {name: getattr(progress, name) for name in ("epoch", "batch", "iteration", "done")}
    history = {"epochs": progress.history.epochs, "best_cycle": progress.history.best_cycle}
    return {"position": position, **history, "scaler": scaler.state_dict() if scaler else {}}


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
    # In the memory layout of the parameters: fused optimizers traverse the memory of all these tensors in parallel.
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
