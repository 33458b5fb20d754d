"""The unit tests that have a device parameter, and the whole recipe without Prefect, DVC and MLflow."""

import copy
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu.material import ROOT, Row, Scale, classifier, packed_folder, row, settings, wait
from unfreeze.batches.loader import activation_batches, shuffled
from unfreeze.device import seed_everything
from unfreeze.evaluation.baseline import baseline_probabilities, fit_baseline
from unfreeze.evaluation.evaluating import evaluate_split
from unfreeze.evaluation.model_choice import Candidate, choose
from unfreeze.evaluation.predicting import backbone_activations, predict_tta, predict_tta_of_heads
from unfreeze.models.classifier import Classifier
from unfreeze.models.freezing import decay_groups
from unfreeze.training.loop import make_optimizer
from unfreeze.training.lr_curve import pick_rate, suggest
from unfreeze.training.phases import Activations, Images, fit_augmented, fit_full, fit_head, unfrozen
from unfreeze.training.range_test import range_test

Seconds = dict[str, float]


def tests(scale: Scale, data: Path) -> list[Row]:
    """Run the library's unit tests that have a device parameter, on this device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    files = [
        str(p) for p in sorted((ROOT / "tests/unfreeze").rglob("test_*.py")) if "from tests.devices" in p.read_text()
    ]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rfE",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-k",
        f"device_{device}",
        *files,
    ]
    if device == "cuda":
        command += ["-n", "6", "--dist", "loadfile"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:], done.stderr[-1000:])
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)", done.stdout, re.M)
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout)}
    rows = [row("tests", ", ".join(f"{n} {kind}" for kind, n in counts.items())), row("passed", done.returncode == 0)]
    return rows + [row(f"failed: {line[:300]}", False) for line in failed]


def recipe(scale: Scale, data: Path) -> Iterator[Row]:
    """Seconds of precompute, logistic regression, both learning-rate finders, the three trainings, and evaluation.

    The last two rows are the sum of these seconds, and the selected model's accuracy on the test images.
    """
    speed, ours, spent = scale.recipe, settings(), Seconds()
    seed_everything(ours.seed)
    images = packed_folder(data, speed.images, speed.size)
    train, valid, test = (images.rows(split) for split in ("train", "valid", "test"))
    model, loader = classifier(speed.network, speed.size, images, speed.batch)
    labels = images.labels

    with _timed(spent, "precompute"):
        activations = np.concatenate(list(backbone_activations(model.backbone, loader)))
    yield _last(spent)
    with _timed(spent, "logistic regression"):
        baseline = baseline_probabilities(
            fit_baseline(activations[train], labels[train]), activations, len(images.classes)
        )
    yield _last(spent)

    def batches(epoch: int, first: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = shuffled(train, speed.batch, ours.seed, epoch)
        return activation_batches(activations, labels, order[first:], loader.device)

    seen = Images(loader, train, valid, ours.augment, ours.seed)
    classes = len(images.classes)
    with _timed(spent, "lr_find"):
        optimizer = make_optimizer(decay_groups(model.head.train().parameters()), ours.train)
        curve = range_test(model.head, optimizer, batches, ours.lr_find, classes)
        rate = pick_rate(suggest(curve, classes), ours.lr_find.pick)
    yield _last(spent)
    with _timed(spent, "train_head"):
        on_activations = Activations(activations, labels, train, valid, speed.batch, ours.seed, loader.device)
        fit_head(model.head, on_activations, rate, ours.train_head, ours.train)
    yield _last(spent)
    heads = {"train_head": copy.deepcopy(model.head)}
    with _timed(spent, "train_augmented"):
        fit_augmented(model, seen, rate, ours.train_augmented, ours.train)
    yield _last(spent)
    heads["train_augmented"] = copy.deepcopy(model.head)
    frozen = copy.deepcopy(model.backbone)
    with _timed(spent, "unfreeze_lr_find"), unfrozen(model, loader, train, ours.unfreeze) as groups:
        curve = range_test(
            model,
            make_optimizer(groups, ours.train),
            lambda epoch, first: loader.augmented(train, ours.augment, ours.seed, epoch, first),
            ours.unfreeze_lr_find,
            classes,
        )
        rate = pick_rate(suggest(curve, classes), ours.unfreeze_lr_find.pick)
    yield _last(spent)
    with _timed(spent, "train_full"):
        history = fit_full(model, seen, rate, ours.train_full, ours.unfreeze, ours.train)
    yield _last(spent)
    with _timed(spent, "evaluate"):
        how = (ours.augment, ours.evaluate.tta_views)
        found = dict(
            zip(heads, predict_tta_of_heads(frozen, list(heads.values()), loader, valid, *how), strict=True),
            train_full=predict_tta(model, loader, valid, *how),
        )
        candidates = [
            Candidate(name, evaluate_split(views, valid, images, baseline[valid]).predictions.tta, labels[valid])
            for name, views in found.items()
        ]
        best, _ = choose(candidates)
        chosen = Classifier(frozen, heads[best.name]) if best.name in heads else model
        views = predict_tta(chosen, loader, test, *how)
        scores = evaluate_split(views, test, images, baseline[test]).metrics
    yield _last(spent)
    epochs = len(history.epochs)
    what = f"all of it, seconds; {len(images)} images, {epochs} epochs of the whole network"
    yield row(what, round(sum(spent.values()), 1))
    yield row(f"test accuracy ({best.name})", round(scores["accuracy"], 4))


def _last(spent: Seconds) -> Row:
    name, seconds = list(spent.items())[-1]
    return row(f"{name}, seconds", round(seconds, 2))


@contextmanager
def _timed(spent: Seconds, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    wait()
    spent[name] = time.perf_counter() - start
