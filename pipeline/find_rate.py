"""Common code of the two learning-rate finders: sweep, pick, plot."""

from collections.abc import Callable, Iterable
from dataclasses import asdict

import torch
from torch import nn

from pipeline.step import Run
from unfreeze.batches.loader import Batch
from unfreeze.reports.plots import lr_find_plot, save_png
from unfreeze.settings.schema import LRFind
from unfreeze.training.lr_curve import COLUMNS, pick_rate, suggest
from unfreeze.training.range_test import range_test


def find_rate(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int, int], Iterable[Batch]],
    settings: LRFind,
    loss: nn.Module,
    classes: int,
) -> dict[str, float]:
    """Sweep the rate over training batches, pick one, write curve and plot.

    Args:
        run: the step's execution.
        model, optimizer: trained during the sweep, and restored afterwards.
        batches: returns the batches of epoch n (from 0), starting with batch i (from 0).
        settings: the sweep's ends, its length, and the rule to pick a rate.
        loss: the training loss.
        classes: number of classes.

    Returns:
        Metrics: the picked rate, and the candidate points of the curve.
    """
    curve = range_test(model, optimizer, batches, settings, classes, run.checkpoint("sweep"), loss)
    for i, row in enumerate(curve.itertuples(index=False, name=None)):
        run.tracker.curve(dict(zip(COLUMNS, row, strict=True)), i)
    picks = suggest(curve, classes)
    rate = settings.rate if settings.rate is not None else pick_rate(picks, settings.pick)
    metrics = {"rate": rate, **asdict(picks)}
    how = "given in params.yaml" if settings.rate is not None else f"rule: {settings.pick}"
    run.log("rate %.2e (%s); lowest loss at %.2e", rate, how, picks.minimum)

    if settings.pick == "divergence" and settings.rate is None and len(curve) == settings.iterations:
        run.log("the loss did not diverge up to the last rate; a higher %s.end may give a higher rate", run.stage)

    curve.to_csv(run.path("curve.csv"), index=False)
    save_png(lr_find_plot(curve, metrics), run.path("lr_find.png"))
    return metrics
