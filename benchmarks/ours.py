"""unfreeze's side of the comparison: the functions that its steps call, without Prefect, DVC and MLflow."""

import copy
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from benchmarks.work import SWEEP, Work, classifier, timed
from unfreeze.batches.loader import Batch, Loader, activation_batches, shuffled
from unfreeze.batches.rendering import read_pixels
from unfreeze.batches.views import random_views
from unfreeze.data.packing import pack
from unfreeze.data.sources import read_source
from unfreeze.device import seed_everything, to_device
from unfreeze.evaluation.baseline import baseline_head, baseline_probabilities, fit_baseline
from unfreeze.evaluation.evaluating import Evaluation, evaluate_split
from unfreeze.evaluation.model_choice import Candidate, choose
from unfreeze.evaluation.predicting import backbone_activations, predict_tta, predict_tta_of_heads
from unfreeze.evaluation.soup import average_weights, greedy_soup
from unfreeze.models.classifier import Classifier
from unfreeze.models.freezing import decay_groups
from unfreeze.settings.schema import LRFind, Train, TrainAugmented, TrainFull, Unfreeze
from unfreeze.training import phases
from unfreeze.training.loop import Callbacks, make_optimizer
from unfreeze.training.lr_curve import pick_rate, suggest
from unfreeze.training.phases import Rows, unfrozen
from unfreeze.training.range_test import range_test

Activations = NDArray[np.float32]
State = dict[str, torch.Tensor]
WHOLE = Unfreeze(freeze_to=0, lr_ratio=3, bn_freeze=True)
"""All layer groups train, as in fastai's epochs."""


@cache
def _classifier(work: Work) -> tuple[Classifier, Loader]:
    return classifier(work, seed=0)


def lr_find(work: Work) -> float:
    """Seconds for an LR range test of the unfrozen network, with `Work.sweep` batches."""
    model, loader = _classifier(work)
    sweep, curves = dataclasses.replace(work.settings.unfreeze_lr_find, **SWEEP, iterations=work.sweep), []
    seconds = timed(lambda: curves.append(_find(work, model, loader, WHOLE, sweep)))
    assert len(curves[0]) == work.sweep
    return seconds


def frozen_epoch(work: Work) -> float:
    """Seconds for an augmented epoch of the head through the frozen network, including validation."""
    model, loader = _classifier(work)
    return timed(lambda: _augmented(work, model, loader, 1, 1e-4))


frozen_norms_epoch = frozen_epoch
"""The same function: no layer of unfreeze's frozen network trains. Only `peer` needs a separate function."""


def full_epoch(work: Work) -> float:
    """Seconds for an epoch of the whole network, including validation."""
    model, loader = _classifier(work)
    return timed(lambda: _full(work, model, loader, WHOLE, 1, 1e-5))


def tta(work: Work) -> float:
    """Seconds for TTA of the validation images, including the plain prediction."""
    model, loader = _classifier(work)
    return timed(lambda: predict_views(work, model, loader, "valid"))


def precompute_rate(work: Work) -> float:
    """Images per second of precomputing activations."""
    model, loader = _classifier(work)
    return len(loader.packed) / timed(lambda: list(backbone_activations(model.backbone, loader)))


def frozen_rate(work: Work) -> float:
    """Images per second of training the augmented head for the recipe's number of epochs, without validation."""
    model, loader = _classifier(work)
    epochs = work.settings.train_augmented.epochs
    trained = epochs * _trained(loader)
    return trained / timed(lambda: _augmented(work, model, loader, epochs, 1e-4, validate=False))


def full_rate(work: Work) -> float:
    """Images per second of an epoch of the whole network, without validation."""
    model, loader = _classifier(work)
    trained = _trained(loader)
    return trained / timed(lambda: _full(work, model, loader, WHOLE, 1, 1e-5, validate=False))


def read_rate(work: Work) -> float:
    """Images per second of reading packed pixels into batches for a GPU; on a CPU, reading and warping are one step."""
    _, loader = _classifier(work)
    chunks = shuffled(loader.packed.rows("train"), loader.batch_size, 0, 0)
    views = [
        random_views(rows, loader.packed.sizes[rows], work.image_size, work.settings.augment, np.random.default_rng(i))
        for i, rows in enumerate(chunks)
    ]
    return _trained(loader) / timed(lambda: [read_pixels(loader.packed, batch) for batch in views])


def _trained(loader: Loader) -> int:
    """Number of images that an epoch trains on."""
    return sum(len(rows) for rows in shuffled(loader.packed.rows("train"), loader.batch_size, 0, 0))


def packing(work: Work) -> float:
    """Seconds for decoding and packing the images, which no function above includes."""
    with tempfile.TemporaryDirectory() as folder:
        return timed(lambda: pack(read_source(work.source), Path(folder), work.settings.data, work.settings.seed))


def recipe(work: Work, seed: int, unfreeze: Unfreeze | None = None) -> dict[str, float]:
    """Run the recipe from images to evaluated model, with the settings of ``work``.

    Args:
        work: images and settings.
        seed: seed of training.
        unfreeze: layer groups that train at the end, if different from the settings.

    Returns:
        Seconds; rate, epochs and best cycle of the whole network; the chosen model (0: logistic regression, 1: head, 2:
        augmented head, 3: whole network, 4: average of its cycles); its scores on valid and test, plain and with TTA.
    """
    start = time.perf_counter()
    seed_everything(seed)
    with tempfile.TemporaryDirectory() as folder:
        # The split is the same as fastai's. The pixels are packed again, because packing is part of the measured work.
        pack(read_source(work.source), Path(folder), work.settings.data, work.settings.seed)
        settings = dataclasses.replace(work.settings, seed=seed, unfreeze=unfreeze or work.settings.unfreeze)
        here = dataclasses.replace(work, folder=Path(folder), settings=settings)
        model, loader, activations = prepare(here, seed)
        packed = loader.packed
        found: dict[str, float] = {}
        rows = {split: packed.rows(split) for split in ("train", "valid", "test")}
        regression = fit_baseline(activations[rows["train"]], packed.labels[rows["train"]])
        baseline = baseline_probabilities(regression, activations, len(packed.classes))
        head = baseline_head(regression, activations.shape[1], len(packed.classes))
        heads = {"baseline": to_device(head, loader.device)}

        def judge(network: Classifier, split: str, temperature: float | None = None) -> Evaluation:
            views = predict_tta(network, loader, rows[split], settings.augment, here.views)
            return evaluate_split(views, rows[split], packed, baseline[rows[split]], temperature)

        states: dict[str, State] = {}
        judged: dict[str, Evaluation] = {}
        cycles: dict[int, State] = {}
        for name in stages(here, model, loader, activations, found, cycles):
            if name.endswith("lr_find"):
                continue
            if name == "train_full":
                states[name], judged[name] = copy.deepcopy(model.state_dict()), judge(model, "valid")
                continue
            heads[name] = copy.deepcopy(model.head)
            if name == "train_augmented":
                of_heads = predict_tta_of_heads(
                    model.backbone, list(heads.values()), loader, rows["valid"], settings.augment, here.views
                )
                for (title, trained), views in zip(heads.items(), of_heads, strict=True):
                    states[title] = copy.deepcopy(Classifier(model.backbone, trained).state_dict())
                    judged[title] = evaluate_split(views, rows["valid"], packed, baseline[rows["valid"]])

        soups: dict[tuple[int, ...], tuple[State, Evaluation]] = {}

        def soup_loss(numbers: Sequence[int]) -> float:
            state = average_weights([cycles[number] for number in numbers])
            model.load_state_dict(state)
            result = judge(model, "valid")
            soups[tuple(numbers)] = state, result
            return result.metrics["tta_log_loss"]

        losses = {number: found.pop(f"cycle {number}") for number in cycles}
        soup = greedy_soup(losses, soup_loss, judged["train_full"].metrics["tta_log_loss"])
        if len(soup) > 1:
            states["soup"], judged["soup"] = soups[tuple(soup)]
        labels = packed.labels[rows["valid"]]
        best, _ = choose([Candidate(name, it.predictions.tta, labels) for name, it in judged.items()])
        model.load_state_dict(states[best.name])
        splits = {"valid": judged[best.name], "test": judge(model, "test", judged[best.name].temperature)}
        scores = {f"{split}_{key}": value for split, it in splits.items() for key, value in it.metrics.items()}
    return {"seconds": time.perf_counter() - start, "chosen": list(states).index(best.name), **found, **scores}


def prepare(work: Work, seed: int) -> tuple[Classifier, Loader, Activations]:
    """A classifier with a new head, a loader of the packed images, and the activations of all images."""
    model, loader = classifier(work, seed)
    return model, loader, np.concatenate(list(backbone_activations(model.backbone, loader)))


def stages(
    work: Work,
    model: Classifier,
    loader: Loader,
    activations: Activations,
    found: dict[str, float] | None = None,
    cycles: dict[int, State] | None = None,
    curves: dict[str, pd.DataFrame] | None = None,
) -> Iterator[str]:
    """Find rates, train head, augmented head and whole network; after each, yield the name of its step.

    ``found`` receives the rate of the whole network, its number of epochs, the cycle that was kept, and the validation
    loss at the end of each cycle. ``cycles`` receives the weights at the end of each cycle; its keys are cycle numbers
    from 1. ``curves`` receives the curves of the learning-rate finders; its keys are their steps.
    """
    settings, packed = work.settings, loader.packed
    train, valid = _rows(loader, validate=True)
    images = _images(work, loader)

    def on_activations(epoch: int, first: int) -> Iterator[Batch]:
        order = shuffled(train, loader.batch_size, settings.seed, epoch, images.probabilities(settings.train))
        return activation_batches(activations, packed.labels, order[first:], loader.device)

    groups = decay_groups(model.head.parameters())

    def find(step: str, sweep: LRFind, test: Callable[[], pd.DataFrame]) -> float:
        if sweep.rate is not None:
            return sweep.rate
        curve = test()
        if curves is not None:
            curves[step] = curve
        return pick_rate(suggest(curve, len(packed.classes)), sweep.pick)

    rate = find(
        "lr_find",
        settings.lr_find,
        lambda: _sweep(images, model.head, groups, on_activations, settings.lr_find, settings.train),
    )
    yield "lr_find"
    data = phases.Activations(activations, packed.labels, train, valid, loader.batch_size, settings.seed, loader.device)
    phases.fit_head(model.head, data, rate, settings.train_head, settings.train)
    yield "train_head"
    phases.fit_augmented(model, images, rate, settings.train_augmented, settings.train)
    yield "train_augmented"
    sweep = settings.unfreeze_lr_find
    rate = find("unfreeze_lr_find", sweep, lambda: _find(work, model, loader, settings.unfreeze, sweep))
    yield "unfreeze_lr_find"

    def keep(number: int) -> None:
        if cycles is not None:
            cycles[number + 1] = copy.deepcopy(model.state_dict())

    history = phases.fit_full(
        model, images, rate, settings.train_full, settings.unfreeze, settings.train, Callbacks(cycle=keep)
    )
    if found is not None:
        name = "valid_calibrated_loss"
        found |= {f"cycle {row['cycle'] + 1:.0f}": row[name] for row in history.epochs if name in row}
        found |= {"rate": rate, "epochs": len(history.epochs), "best_cycle": history.best_cycle + 1}
    yield "train_full"


def _augmented(work: Work, model: Classifier, loader: Loader, epochs: int, rate: float, validate: bool = True) -> None:
    settings = TrainAugmented("sgdr", epochs, 1, 1)
    phases.fit_augmented(model, _images(work, loader, validate), rate, settings, work.settings.train)


def _full(
    work: Work, model: Classifier, loader: Loader, unfreeze: Unfreeze, epochs: int, rate: float, validate: bool = True
) -> None:
    settings = TrainFull("sgdr", 1, epochs, 1, warmup=0, until_overfitting=False)
    phases.fit_full(model, _images(work, loader, validate), rate, settings, unfreeze, work.settings.train)


def _images(work: Work, loader: Loader, validate: bool = True) -> phases.Images:
    return phases.Images(loader, *_rows(loader, validate), work.settings.augment, work.settings.seed)


def _rows(loader: Loader, validate: bool) -> tuple[Rows, Rows]:
    valid = loader.packed.rows("valid")
    return loader.packed.rows("train"), valid if validate else valid[:0]


def _find(work: Work, model: Classifier, loader: Loader, unfreeze: Unfreeze, sweep: LRFind) -> pd.DataFrame:
    images, train = _images(work, loader), work.settings.train

    def augmented(epoch: int, first: int) -> Iterator[Batch]:
        return images.augmented(train, work.settings.seed, epoch, first)

    with unfrozen(model, loader, images.train, unfreeze) as groups:
        return _sweep(images, model, groups, augmented, sweep, train)


def _sweep(
    images: phases.Images,
    model: Any,
    groups: Any,
    batches: Callable[[int, int], Iterator[Batch]],
    sweep: LRFind,
    train: Train,
) -> pd.DataFrame:
    return range_test(
        model, make_optimizer(groups, train), batches, sweep, len(images.loader.packed.classes), loss=images.loss(train)
    )


def predict_views(work: Work, model: Classifier, loader: Loader, split: str) -> Any:
    """Probabilities of a split's images, plain and averaged over views."""
    rows = loader.packed.rows(split)
    return predict_tta(model, loader, rows, work.settings.augment, work.views).averaged()
