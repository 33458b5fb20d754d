"""Check that trainings give the same bits: in another process, as CUDA graphs, and if they are killed and resumed."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.pool import Pool, ThreadPool
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from benchmarks.gpu.material import Row, Scale, classifier, digest, packed, row, settings, wait
from unfreeze.batches.loader import Batch, Loader
from unfreeze.batches.views import Views
from unfreeze.device import deterministically, seed_everything
from unfreeze.evaluation import predicting
from unfreeze.evaluation.predicting import backbone_activations, predict_tta
from unfreeze.models.classifier import Classifier
from unfreeze.persistence.resumable import ResumableFile
from unfreeze.settings.schema import LRFind, TrainAugmented, TrainFull
from unfreeze.training.checkpoints import Checkpoint
from unfreeze.training.loop import Callbacks, make_optimizer, set_rate
from unfreeze.training.phases import Images, fit_augmented, fit_full, unfrozen
from unfreeze.training.range_test import range_test
from unfreeze.training.train_step import GraphedStep, record, train_batch

AT_ONCE = 5


def determinism(scale: Scale, data: Path) -> list[Row]:
    """Run the same training twice, each time in a new process, and compare the bits."""
    rows = []
    with _processes() as pool:
        runs = {name: [pool.apply_async(_trained, (scale, name)) for _ in range(2)] for name in scale.strict}
        for name, (first, second) in runs.items():
            try:
                one, other = first.get(), second.get()
            except Exception as error:
                rows.append(row(f"{name}: {error}", False))
                continue
            for part in one:
                rows.append(row(f"{name}, {part}: the same bits", one[part] == other[part]))
    return rows


def _trained(scale: Scale, name: str) -> dict[str, str]:
    """Hash of the weights and losses of some training steps, for each `freeze_to`."""
    found, ours = {}, settings()
    images = packed(scale.steps * scale.batch * 4 // 3 + 8, scale.size)
    for first in (0, 1):
        seed_everything(0)
        model, loader = classifier(name, scale.size, images, scale.batch)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rows = images.rows("train")[: scale.steps * scale.batch]
            history = fit_full(
                model, Images(loader, rows, rows[:0], ours.augment, 0), 1e-3, TrainFull("sgdr", 1, 1, 1, 0, False),
                replace(ours.unfreeze, freeze_to=first), ours.train,
            )  # fmt: skip
        said = {str(w.message).split(" ")[0] for w in caught if "deterministic" in str(w.message)}
        losses = [batch["loss"] for batch in history.batches]
        key = f"freeze_to {first}" + (f" (torch warns of {', '.join(sorted(said))})" if said else "")
        found[key] = digest([*model.state_dict().values(), torch.tensor(losses)])
    return found


def graphs(scale: Scale, data: Path) -> Iterator[Row]:
    """Compare training steps replayed as CUDA graphs with the same steps without CUDA graphs."""
    if not torch.cuda.is_available():
        yield row("CUDA graphs", "not without a GPU")
        return
    with _processes() as pool:
        runs = {name: pool.apply_async(_both_ways, (scale, name)) for name in scale.strict}
        for name, found in runs.items():
            try:
                yield from found.get()
            except Exception as error:
                yield row(f"{name}: {str(error)[:300]}", False)


def _both_ways(scale: Scale, name: str) -> list[Row]:
    rows = []
    for kind in ("adamw", "sgd"):
        eager, graphed = (_stepped(scale, name, kind, graphed) for graphed in (False, True))
        rows.append(row(f"{name}, {kind}: a graph's steps have the same bits", eager[0] == graphed[0]))
        rows.append(row(f"{name}, {kind}: losses of the last steps", f"{eager[1]:.6f}, {graphed[1]:.6f}"))
        rows.append(row(f"{name}, {kind}: times as fast", round(eager[2] / graphed[2], 2)))
    return rows


def _stepped(scale: Scale, name: str, kind: str, graphed: bool) -> tuple[str, float, float]:
    """Hash of weights, losses and random state after some steps, the last loss, and seconds of a step."""
    ours = settings()
    images = packed(scale.steps * scale.batch * 4 // 3 + 8, scale.size)
    seed_everything(0)
    model, loader = classifier(name, scale.size, images, scale.batch)
    rows = images.rows("train")[: scale.steps * scale.batch]
    with unfrozen(model, loader, rows, replace(ours.unfreeze, freeze_to=0)) as groups:
        optimizer = make_optimizer(groups, replace(ours.train, optimizer=kind))
        batches = list(loader.augmented(rows, ours.augment, 0, 0))
        torch.manual_seed(1)
        loss = nn.CrossEntropyLoss()
        eager = partial(train_batch, model, optimizer, loss=loss)
        # Recorded in both cases: this finds the operations that have no deterministic implementation.
        deterministically(lambda: record(model, optimizer, batches[0], loss))
        step: Any = GraphedStep(model, optimizer, batches[0], loss) if graphed else eager
        losses = []
        for number, batch in enumerate(batches):
            set_rate(optimizer, 1e-3 / (1 + number))
            losses.append(deterministically(partial(step, batch)))
        found = digest([*model.state_dict().values(), torch.stack(losses), torch.cuda.get_rng_state()])
        wait()
        start = time.perf_counter()
        for batch in batches:
            step(batch)
        wait()
        return found, float(losses[-1]), (time.perf_counter() - start) / len(batches)


def resume(scale: Scale, data: Path) -> list[Row]:
    """Kill trainings, a range test, predictions and activations at some batch, and resume them in another process."""
    folder = data / "resume"
    with _processes() as pool:
        whole = pool.apply_async(_worked, (scale, None, None))
        killed = [pool.apply_async(_worked, (scale, folder / str(kill), kill)) for kill in scale.kills]
        assert all(set(found.get().values()) == {"killed"} for found in killed)
        again = [pool.apply_async(_worked, (scale, folder / str(kill), None)) for kill in scale.kills]
        expected, rows = whole.get(), []
        for kill, found in zip(scale.kills, again, strict=True):
            for name, bits in found.get().items():
                rows.append(row(f"{name} killed at batch {kill}: the same bits", bits == expected[name]))
    return rows


def _processes() -> Pool:
    """Pool that runs every call in a new process; without a GPU, in a thread, so that the toy size is fast."""
    return get_context("spawn").Pool(AT_ONCE, maxtasksperchild=1) if torch.cuda.is_available() else ThreadPool(1)


class _Killed(Exception):
    """Simulates a kill of the process; the work is resumed in another process."""


class _Ending(Loader):
    """A loader that simulates a kill at batch number ``kill``."""

    kill: int

    def views(self, batches: Iterable[Views]) -> Iterator[Batch]:
        for number, batch in enumerate(super().views(batches)):
            if number == self.kill:
                raise _Killed
            yield batch


def _worked(scale: Scale, folder: Path | None, kill: int | None) -> dict[str, str]:
    """Hash of the result of each kind of work, or "killed" if it was killed."""
    name = scale.recipe.network
    return {
        work.__name__.strip("_"): _until_killed(work, scale, name, folder, kill)
        for work in (_whole_network, _augmented_head, _range_test, _tta, _precompute)
    }


def _until_killed(work: Callable[..., str], scale: Scale, name: str, folder: Path | None, kill: int | None) -> str:
    seed_everything(0)
    images = packed(12 * scale.batch * 4 // 3, scale.size)  # twelve batches to train on
    model, loader = classifier(name, scale.size, images, scale.batch)
    try:
        with mock.patch.object(Loader, "wide", 2 * scale.batch):  # larger batches: too few to reach `kill`
            return work(model, loader, folder, kill)
    except _Killed:
        return "killed"


def _images(loader: Loader) -> Images:
    return Images(loader, loader.packed.rows("train"), loader.packed.rows("valid"), settings().augment, 0)


def _callbacks(kill: int | None, folder: Path | None, name: str) -> Callbacks:
    def batches(rows: Any) -> None:
        if kill is not None and rows[-1]["iteration"] >= kill:
            raise _Killed

    return Callbacks(batches=batches, checkpoint=_checkpoint(folder, name))


def _checkpoint(folder: Path | None, name: str) -> Checkpoint | None:
    return None if folder is None else Checkpoint(folder / name, "key", seconds=1e9, batches=1)


def _whole_network(model: Classifier, loader: Loader, folder: Path | None, kill: int | None) -> str:
    ours = settings()
    full = TrainFull("sgdr", 1, 2, 1, 0, True)
    fit_full(model, _images(loader), 1e-3, full, ours.unfreeze, ours.train, _callbacks(kill, folder, "full"))
    return digest(model.state_dict().values())


def _augmented_head(model: Classifier, loader: Loader, folder: Path | None, kill: int | None) -> str:
    augmented, train = TrainAugmented("sgdr", 2, 1, 1), settings().train
    fit_augmented(model, _images(loader), 1e-3, augmented, train, _callbacks(kill, folder, "augmented"))
    return digest(model.state_dict().values())


def _range_test(model: Classifier, loader: Loader, folder: Path | None, kill: int | None) -> str:
    ours, rows = settings(), loader.packed.rows("train")
    seen = 0

    def batches(epoch: int, first: int) -> Iterator[Batch]:
        nonlocal seen
        for batch in loader.augmented(rows, ours.augment, 0, epoch, first):
            if seen == kill:
                raise _Killed
            seen += 1
            yield batch

    classes = len(loader.packed.classes)
    with unfrozen(model, loader, rows, ours.unfreeze) as groups:
        optimizer = make_optimizer(groups, ours.train)
        curve = range_test(
            model, optimizer, batches, LRFind(1e-5, 0.01, 16, "minimum", None), classes, _checkpoint(folder, "sweep")
        )
    return digest([torch.tensor(curve.to_numpy())])


def _tta(model: Classifier, loader: Loader, folder: Path | None, kill: int | None) -> str:
    rows, augment = np.arange(len(loader.packed)), settings().augment
    if folder is None:
        return digest(torch.from_numpy(found) for found in predict_tta(model, loader, rows, augment, 4).averaged())
    if kill is not None:
        loader = _Ending(loader.packed, loader.norm, loader.device, loader.batch_size)
        object.__setattr__(loader, "kill", kill)  # a frozen dataclass
    with mock.patch.object(predicting, "TOGETHER", 1), ResumableFile(folder / "tta", "key", 1e9) as kept:
        return digest(
            torch.from_numpy(found) for found in predict_tta(model, loader, rows, augment, 4, kept).averaged()
        )


def _precompute(model: Classifier, loader: Loader, folder: Path | None, kill: int | None) -> str:
    if folder is None:
        return digest(map(torch.from_numpy, backbone_activations(model.backbone, loader)))
    with ResumableFile(folder / "activations", "key", 1e9) as file:
        for number, found in enumerate(backbone_activations(model.backbone, loader, sum(file.notes))):
            if kill is not None and number == min(kill, 5):  # there are eight batches, of twice the size
                raise _Killed
            file.append(found.tobytes(), len(found))
        file.keep()
    content = np.fromfile(folder / "activations", np.float32)
    return digest([torch.from_numpy(content)])
