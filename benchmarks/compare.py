"""Measure unfreeze and fastai alternately on the same work, each in its own process, which keeps its network loaded."""

import dataclasses
import os
import platform
import subprocess
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context, set_start_method
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from benchmarks import ceilings, ours, peer
from benchmarks.work import Work, batch_size, with_epochs
from pipeline.process.signals import die_with, identity
from unfreeze.data.packed import open_packed

CASES = {
    "lr_find": "LR finder, whole network",
    "frozen_epoch": "augmented epoch, frozen network",
    "frozen_norms_epoch": "the same, fastai's BatchNorm frozen too",
    "full_epoch": "epoch, whole network",
    "tta": "TTA of the validation images",
}
"""Functions that both `ours` and `peer` define, and their descriptions."""
PARTS = {
    ceilings.forward: {
        "precompute": ours.precompute_rate,
        "augmented frozen epoch": ours.frozen_rate,
        "reading packed pixels": ours.read_rate,
    },
    ceilings.training: {"epoch of the whole network": ours.full_rate},
}
"""Ceilings, and the functions of `ours` that are compared with each."""
ALL, OURS = "unfreeze, all layers", "unfreeze, its settings"
"""Two variants of unfreeze's recipe: at the end, all layer groups train, or those of the settings."""


def speed(work: Work, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds of each case on both sides, and ratios of the medians. Packing, done once before, is timed separately."""
    result: dict[str, Any] = {}
    with ExitStack() as stack:
        us, them = (stack.enter_context(process()) for _ in range(2))
        result["packing"] = us.submit(ours.packing, work).result()
        say(f"reading and packing the images, once: {result['packing']:.1f} s")
        for name in CASES:
            times: dict[str, list[float]] = {"unfreeze": [], "fastai": []}
            for _ in range(repeats):
                times["unfreeze"].append(us.submit(getattr(ours, name), work).result())
                times["fastai"].append(them.submit(getattr(peer, name), work).result())
            ratio = median(times["fastai"]) / median(times["unfreeze"])
            result[name] = {**times, "ratio": ratio}
            say(
                f"{CASES[name]}: {median(times['unfreeze']):.1f} s, fastai {median(times['fastai']):.1f} s: {ratio:.1f} x"
            )
    return result


def shares(work: Work, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Throughput of unfreeze without validation, as a share of the ceiling.

    The ceiling is the throughput of the fastest variant of the network on one batch (`benchmarks.ceilings`). Usually
    this is unfreeze's own variant, so the share of the fastest other variant is reported too (``of_others``). Ceilings
    and unfreeze are measured alternately; the result is the turn with the median share. For each ceiling, unfreeze runs
    in a new process, as in the steps, because the memory of a process that has trained before is fragmented. The first
    run of each function is not counted.
    """
    found: dict[str, Any] = {}
    for top, rates in PARTS.items():
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in rates}
        with process() as us, process() as ceiling:
            for rate in rates.values():
                us.submit(rate, work).result()
            for _ in range(repeats):
                ways = ceiling.submit(top, work).result()
                way = max(ways, key=lambda w: ways[w])
                others = max(rate for name, rate in ways.items() if not name.startswith("unfreeze"))
                for name, rate in rates.items():
                    mine = us.submit(rate, work).result()
                    share = {"share": mine / ways[way], "of_others": mine / others}
                    turns[name].append({"rate": mine, **share, "way": way, "ways": ways})
        for name, taken in turns.items():
            middle = sorted(taken, key=lambda turn: turn["share"])[(len(taken) - 1) // 2]
            found[name] = {**middle, "shares": [turn["share"] for turn in taken]}
            say(
                f"{name}: {middle['rate']:.0f} images/s, {middle['share']:.0%} of the ceiling ({middle['way']}), "
                f"{middle['of_others']:.0%} of the best without unfreeze"
            )
    return found


def accuracy(work: Work, seeds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds from images to evaluated model and accuracies, on both sides with equal epochs, for each seed.

    unfreeze runs twice: with all layer groups unfrozen at the end, as in fastai, and with those of the settings.
    """
    work = with_epochs(work, 2, 4)
    runs: dict[str, list[dict[str, float]]] = {ALL: [], OURS: [], "fastai": []}
    with ExitStack() as stack:
        us, them = (stack.enter_context(process()) for _ in range(2))
        turns = ((ALL, us, ours.recipe, (ours.WHOLE,)), (OURS, us, ours.recipe, ()), ("fastai", them, peer.recipe, ()))
        for seed in range(seeds):
            for name, pool, function, more in turns:
                runs[name].append(pool.submit(function, work, seed, *more).result())
                last = runs[name][-1]
                say(f"{name}, seed {seed}: " + ", ".join(f"{key} {value:.4g}" for key, value in last.items()))
    means = {
        name: {key: sum(run[key] for run in found) / len(found) for key in found[0]} for name, found in runs.items()
    }
    seconds = {name: median(run["seconds"] for run in found) for name, found in runs.items()}
    ratios = {name: seconds["fastai"] / seconds[name] for name in (ALL, OURS)}
    say("images to evaluated model: " + ", ".join(f"{name} {ratio:.1f} x" for name, ratio in ratios.items()))
    epochs = {"frozen": work.frozen_epochs, "full": work.full_epochs}
    return {"runs": runs, "means": means, "ratios": ratios, "epochs": epochs}


def about(work: Work) -> dict[str, Any]:
    """Settings, images, packages, commit and machine of a measurement."""
    import importlib.metadata

    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    packages = {name: installed.get(name) for name in ("torch", "torchvision", "timm", "fastai")}
    settings = dataclasses.asdict(work.settings)
    settings["data"]["source"] = Path(work.source).name  # without the folder, which is private
    settings["batch_size"] = batch_size(work)
    packed = open_packed(work.folder)
    return {
        "settings": settings,
        "images": {split: len(packed.rows(split)) for split in ("train", "valid", "test")},
        "views": work.views,
        "fastai_workers": work.workers,
        "packages": packages,
        "code": _revision(),
        "machine": machine(),
    }


def machine() -> str:
    """Name of the GPU, or of the processor with its number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    processor = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return f"{processor or platform.machine()}, {torch.get_num_threads()} threads"


def _revision() -> str | None:
    """The measured commit, with ``-dirty`` if tracked files other than results and docs have changed."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs")
    commit = git("rev-parse", "--short=12", "HEAD")
    return commit + "-dirty" * bool(changed) if commit else None


def helpful_workers(work: Work, say: Callable[[str], None]) -> int:
    """Number of loader processes with which fastai is fastest: none, one, or one per core.

    The second epoch of each is compared.
    """
    times = {}
    for workers in sorted({0, 1, os.cpu_count() or 1}):
        with process() as them:
            asked = dataclasses.replace(work, workers=workers)
            times[workers] = [them.submit(peer.frozen_epoch, asked).result() for _ in range(2)][-1]
    best = min(times, key=lambda workers: times[workers])
    say(f"fastai is fastest with {best} loader processes: " + ", ".join(f"{n}: {t:.1f} s" for n, t in times.items()))
    return best


def process() -> ProcessPoolExecutor:
    """An executor with one process, which ends when the parent process ends."""
    return ProcessPoolExecutor(1, get_context("spawn"), _prepare)


def _prepare() -> None:
    """Set up a process of the comparison: hide warnings, end with the parent process, fork child processes.

    A spawned process would spawn its child processes too: fastai's workers would import all modules again in every
    epoch, which took as long as the epoch itself. The hidden warnings are about fastai's use of torch.
    """
    die_with([identity(psutil.Process(os.getppid()))])  # else an orphan would slow down the next measurement
    set_start_method("fork", force=True)
    warnings.filterwarnings("ignore", category=FutureWarning)
