"""Ceilings of the card, throughput of the recipe's functions, and profiles of their time."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch
import torch.nn.functional as F

from benchmarks.gpu.material import Row, Scale, Speed, classifier, packed_folder, row, settings, wait
from unfreeze.acceleration.frozen import frozen_copy
from unfreeze.batches.loader import Loader, shuffled
from unfreeze.batches.rendering import read_pixels
from unfreeze.batches.views import random_views
from unfreeze.device import autocast, best_device, seed_everything, to_device
from unfreeze.evaluation.predicting import backbone_activations, predict_tta
from unfreeze.models.backbones import create_backbone
from unfreeze.models.classifier import Classifier, Head
from unfreeze.models.freezing import freeze_to, parameter_groups, set_train_mode
from unfreeze.settings.schema import TrainAugmented, TrainFull
from unfreeze.training import train_step
from unfreeze.training.loop import Callbacks
from unfreeze.training.phases import Images, Rows, fit_augmented, fit_full

Run = Callable[[], object]
WARM_UP = 3
COMPILED = "compiled"


def _few(data: Path, speed: Speed) -> tuple[Classifier, Loader]:
    """A network, and a loader of packed images."""
    images = packed_folder(data, speed.images, speed.size)
    return classifier(speed.network, speed.size, images, speed.batch)


def _network(speed: Speed) -> Classifier:
    network = create_backbone(speed.network, "none", speed.size)
    return to_device(Classifier(network, Head(network.num_features, 4, 0.5)), best_device())


def ceilings(scale: Scale, data: Path) -> Iterator[Row]:
    """Images per second of the network alone on one batch in memory, for each way to run it."""
    ways: list[tuple[str, bool]] = [("eager", True)]
    if torch.cuda.is_available():
        ways += [("graph", True), (COMPILED, False), ("eager", False), ("graph", False)]
    whats = [
        (speed, kind, batch, way, deterministic)
        for speed in reversed(scale.speeds)
        for kind in (_training, _inference)
        for batch in sorted({*scale.batches, speed.batch})
        for way, deterministic in ways
        if way != COMPILED or batch == speed.batch  # compiling takes long
    ]

    def rank(what: tuple[Speed, Any, int, str, bool]) -> tuple[bool, bool, bool]:
        """Sort key: first the ceilings that the recipe's functions are compared with (inference: largest batches)."""
        speed, kind, batch, way, deterministic = what
        compared = batch == speed.batch or (kind is _inference and batch == max(scale.batches))
        return not compared, way == COMPILED, not deterministic

    whats.sort(key=rank)
    for speed, kind, batch, way, deterministic in whats:
        how = "deterministic" if deterministic else "free"
        what = f"{kind.__name__[1:]} {speed.network} batch {batch} {way}, {how}"
        try:
            _set_deterministic(deterministic)
            yield row(what, round(batch / _seconds(kind(speed, batch, way), scale.seconds), 1))
        except Exception as error:
            yield row(what, f"failed: {_line(error)}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _set_deterministic(on: bool) -> None:
    seed_everything(0)
    if not on:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True


def _training(speed: Speed, batch: int, way: str) -> Run:
    """A training step of the whole network."""
    model, device = _network(speed), best_device()
    freeze_to(model, 0)
    set_train_mode(model)
    inputs = torch.randn(batch, 3, speed.size, speed.size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device) % 4
    graph = way == "graph"
    groups = [{**group, "lr": 1e-6} for group in parameter_groups(model, 3)]
    optimizer = torch.optim.AdamW(groups, fused=True, capturable=device.type == "cuda")
    network: Any = torch.compile(model, dynamic=False) if way == COMPILED else model

    def step() -> None:
        with autocast(device):
            logits = network(inputs)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return _captured(step) if graph else step


def _inference(speed: Speed, batch: int, way: str) -> Run:
    """Activations of a batch, computed by the frozen copy or by the compiled network."""
    model, device = _network(speed), best_device()
    inputs = torch.randn(batch, 3, speed.size, speed.size, device=device).contiguous(memory_format=torch.channels_last)
    network: Any = model.backbone.eval().requires_grad_(False)
    network = torch.compile(network, dynamic=False) if way == COMPILED else frozen_copy(network, inputs)

    def step() -> None:
        with torch.no_grad(), autocast(device):
            network(inputs)

    return _captured(step) if way == "graph" else step


def _captured(step: Run) -> Run:
    """Capture a step as a CUDA graph; return its replay."""
    stream: Any = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _seconds(run: Run, least: float) -> float:
    """Mean seconds of a call in a series of calls: the best of three series."""
    for _ in range(WARM_UP):
        run()
    wait()
    start = time.perf_counter()
    run()
    wait()
    count = max(2, int(least / 3 / (time.perf_counter() - start)))
    rounds = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(count):
            run()
        wait()
        rounds.append((time.perf_counter() - start) / count)
    return min(rounds)


def ours(scale: Scale, data: Path) -> Iterator[Row]:
    """Images per second of the recipe's functions (after a warm-up), and seconds for copies of network and pixels."""
    for speed in reversed(scale.speeds):
        seed_everything(0)
        name = f"{speed.network} batch {speed.batch}"
        model, loader = _few(data, speed)
        rows = loader.packed.rows("train")[: speed.epoch]
        if torch.cuda.is_available():
            yield _measured(
                f"pixels to the card {name}, seconds", partial(_once, partial(getattr, replace(loader), "on_card"))
            )
        example = next(loader.plain(rows))[0]
        for when in ("first", "second"):  # precompute and TTA below each make a copy; their rates include it
            copied = partial(frozen_copy, model.backbone, example)
            yield _measured(f"{when} frozen copy {name}, seconds", partial(_once, copied))
        trainings = {
            "whole network": partial(_full, model, loader, rows, 0),
            "late half": partial(_full, model, loader, rows, 1),
            "frozen": partial(_augmented, model, loader, rows),
        }
        for what, train in trainings.items():
            yield _measured(f"{what} {name}", partial(_second_epoch, train, len(rows)))
        for what, count, run in (
            ("precompute", len(rows), partial(_activations, model, _of(loader, rows))),
            ("TTA views", 9 * len(rows) // 8, partial(_tta, model, loader, rows[: len(rows) // 8])),
            ("batches alone", len(rows), partial(_batches, loader, rows)),
            ("reading", len(rows), partial(_reading, loader, rows)),
        ):
            yield _measured(f"{what} {name}", partial(_second_time, count, run))
        if not torch.cuda.is_available():
            continue
        with mock.patch.object(train_step, "record", lambda *arguments: None):
            for what in ("whole network", "frozen"):
                yield _measured(f"{what}, not recorded {name}", partial(_second_epoch, trainings[what], len(rows)))
        with mock.patch.object(Loader, "on_card", None):
            elsewhere = replace(loader)  # a copy, whose pixels are not on the card yet
            train = partial(_full, model, elsewhere, rows, 0)
            yield _measured(f"whole network, pixels not on the card {name}", partial(_second_epoch, train, len(rows)))
            train = partial(_augmented, model, elsewhere, rows)
            yield _measured(f"frozen, pixels not on the card {name}", partial(_second_epoch, train, len(rows)))


def _measured(what: str, measure: Callable[[], float]) -> Row:
    """A row with the measured value, or with the error message."""
    try:
        return row(what, measure())
    except Exception as error:
        return row(what, f"failed: {_line(error)}")


def _of(loader: Loader, rows: Rows) -> Loader:
    """A loader of the first ``len(rows)`` images."""
    packed = loader.packed
    first = replace(
        packed,
        table=packed.table.iloc[: len(rows)],
        labels=packed.labels[: len(rows)],
        sizes=packed.sizes[: len(rows)],
        offsets=packed.offsets[: len(rows)],
    )
    return replace(loader, packed=first)


def _full(model: Classifier, loader: Loader, rows: Rows, first: int, callbacks: Callbacks, epochs: int = 2) -> None:
    ours = settings()
    fit_full(
        model, Images(loader, rows, rows[:0], ours.augment, 0), 1e-5, TrainFull("sgdr", 1, epochs, 1, 0, False),
        replace(ours.unfreeze, freeze_to=first), ours.train, callbacks,
    )  # fmt: skip


def _augmented(model: Classifier, loader: Loader, rows: Rows, callbacks: Callbacks, epochs: int = 2) -> None:
    ours = settings()
    data = Images(loader, rows, rows[:0], ours.augment, 0)
    fit_augmented(model, data, 1e-4, TrainAugmented("sgdr", epochs, 1, 1), ours.train, callbacks)


def _second_epoch(train: Callable[[Callbacks], None], images: int) -> float:
    """Images per second of the second of two epochs. Reading the losses at an epoch's end waits for the GPU."""
    ends: list[float] = []
    train(Callbacks(epoch=lambda row: ends.append(time.perf_counter())))
    return round(images / (ends[1] - ends[0]), 1)


def _second_time(count: int, run: Run) -> float:
    run()
    return round(count / _once(run), 1)


def _once(run: Run) -> float:
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def _activations(model: Classifier, loader: Loader) -> None:
    for _ in backbone_activations(model.backbone, loader):
        pass


def _tta(model: Classifier, loader: Loader, rows: Rows) -> None:
    predict_tta(model.eval(), loader, rows, settings().augment, 8)


def _batches(loader: Loader, rows: Rows) -> None:
    """Render augmented batches, and discard them."""
    for _ in loader.augmented(rows, settings().augment, 0, 0):
        pass


def _reading(loader: Loader, rows: Rows) -> None:
    """Copy bytes from the packed file into batches for the card, in one thread."""
    augment, rng = settings().augment, np.random.default_rng(0)
    for chunk in shuffled(rows, loader.batch_size, 0, 0):
        sizes = loader.packed.sizes[chunk]
        read_pixels(loader.packed, random_views(chunk, sizes, loader.packed.image_size, augment, rng))


def shares(found: list[Row], tops: list[Row], scale: Scale) -> list[Row]:
    """Rates of `ours` as shares of the best of the `ceilings`, with bars (targets)."""
    best: dict[tuple[str, str], float] = {}
    for ceiling in tops:
        if not isinstance(ceiling["value"], float):
            continue
        kind, network, _, batch, *_ = ceiling["what"].split(" ")
        # Inference uses larger batches than training, so its ceiling is the best of all batch sizes.
        size = batch if kind == "training" else ""
        best[kind + network, size] = max(best.get((kind + network, size), 0.0), ceiling["value"])
    rates: dict[str, float] = {each["what"]: each["value"] for each in found}
    rows: list[Row] = []
    for speed in scale.speeds:
        for name in ("whole network", "frozen", "precompute", "TTA views"):
            kind, size = ("training", str(speed.batch)) if name == "whole network" else ("inference", "")
            top, rate = best.get((kind + speed.network, size)), rates.get(f"{name} {speed.network} batch {speed.batch}")
            if top and rate:
                bar = speed.bars.get(name)
                rows.append(row(f"share of the ceiling: {name} {speed.network}", round(rate / top, 3), at_least=bar))
    return rows


def memory(scale: Scale, data: Path) -> list[Row]:
    """Growth of memory over a long training."""
    speed = scale.recipe
    seed_everything(0)
    model, loader = _few(data, speed)
    seen: list[tuple[float, float, float]] = []
    process = psutil.Process()

    def look(rows: Any) -> None:
        on_card = torch.cuda.memory_allocated() / 1e6 if torch.cuda.is_available() else 0.0
        reserved = torch.cuda.memory_reserved() / 1e6 if torch.cuda.is_available() else 0.0
        seen.append((on_card, reserved, process.memory_info().rss / 1e6))

    rows = loader.packed.rows("train")
    epochs = -(-scale.long // (len(rows) // speed.batch))
    _full(model, loader, rows, 0, Callbacks(batches=look), epochs=max(2, epochs))
    early, last = seen[min(len(seen) // 3, 5)], seen[min(len(seen), scale.long // 10) - 1]
    names = ("on the card, allocated", "on the card, reserved", "of the process")
    table = [
        row(f"MB more after {scale.long} steps, {name}", round(b - a, 1), at_most=most)
        for name, a, b, most in zip(names, early, last, (8.0, 64.0, 300.0), strict=True)
    ]
    return [*table, row("MB on the card, reserved", round(last[1]))]


def profile(scale: Scale, data: Path) -> Iterator[Row]:
    """Ten training steps in torch's profiler: share of time the device is busy, launches, waits, slowest kernels."""
    for speed in reversed(scale.speeds):
        seed_everything(0)
        model, loader = _few(data, speed)
        rows = loader.packed.rows("train")[: 40 * speed.batch]
        trainings = {
            "whole network": partial(_full, model, loader, rows, 0),
            "frozen": partial(_augmented, model, loader, rows),
        }
        for name, train in trainings.items():
            yield from _profiled(f"{name} {speed.network} batch {speed.batch}", train)


class _Enough(Exception):
    """Raised when the profiled steps have ended."""


def _profiled(what: str, train: Callable[[Callbacks], None]) -> list[Row]:
    from torch.profiler import ProfilerActivity

    cuda = torch.cuda.is_available()
    profiler: Any = torch.profiler.profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda])
    calls, wall = 0, [0.0, 0.0]

    def listen(rows: Any) -> None:  # called every ten steps, and at the end of an epoch
        nonlocal calls
        calls += 1
        if calls == (2 if cuda else 1):
            wait()
            profiler.start()
            wall[0] = time.perf_counter()
        elif wall[0]:
            wait()
            wall[1] = time.perf_counter()
            profiler.stop()
            raise _Enough

    try:
        train(Callbacks(batches=listen))
        return [row(f"{what}: too few steps", calls)]
    except _Enough:
        pass
    events = list(profiler.events())
    kernels = [e for e in events if str(e.device_type).endswith("CUDA")]
    launches = sum("LaunchKernel" in e.name or "GraphLaunch" in e.name for e in events)
    waits = Counter(e.name for e in events if "Synchronize" in e.name and not str(e.device_type).endswith("CUDA"))
    seconds = wall[1] - wall[0]
    busy = _union([(k.time_range.start, k.time_range.end) for k in kernels]) / 1e6
    spent: Counter[str] = Counter()
    for kernel in kernels:
        spent[kernel.name[:70]] += kernel.time_range.end - kernel.time_range.start
    rows = [
        row(f"{what}: seconds of ten steps, profiled", round(seconds, 4)),
        row(f"{what}: share of time the card is busy", round(busy / seconds, 3)),
        row(f"{what}: launches a step", launches / 10),
        row(f"{what}: waits a step", {name: count / 10 for name, count in waits.items()}),
    ]
    total = max(1e-9, sum(spent.values()))
    for name, micro in spent.most_common(10):
        rows.append(row(f"{what}: {name}", f"{micro / total:.1%}"))
    return rows


def _union(spans: list[tuple[float, float]]) -> float:
    """Total time that the spans cover; overlapping time counts once."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered
