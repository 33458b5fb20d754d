"""What the two learning-rate finders have in common: sweep, pick, plot."""

from collections.abc import Callable

import torch
from torch import nn

from tasks.step import Run
from unfreeze.lr_finder import lr_find, pick_rate, suggest
from unfreeze.plotting import lr_find_plot, save_png
from unfreeze.preserve import preserved
from unfreeze.settings import LRFind, UnfreezeLRFind
from unfreeze.training import set_rate


def find_rate(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train_batch: Callable[[], float],
    settings: LRFind | UnfreezeLRFind,
) -> dict[str, float]:
    """Sweep the rate over training batches, pick one, keep curve and plot.

    Args:
        run: the step's execution.
        model, optimizer: what is trained during the sweep and left as it was.
        train_batch: trains on the next batch and returns its loss.
        settings: the sweep's ends, its length, and the rule that picks.

    Returns:
        Metrics: the rate to train with, and the points of the curve it was chosen among.
    """
    with preserved(model, optimizer):
        curve = lr_find(
            train_batch,
            lambda rate: set_rate(optimizer, rate),
            settings.start,
            settings.end,
            settings.iterations,
        )
    for i, (at, loss, smoothed) in enumerate(curve.itertuples(index=False, name=None)):
        run.tracker.curve({"rate": at, "loss": loss, "smoothed": smoothed}, i)
    picks = suggest(curve["rate"].to_numpy(), curve["loss"].to_numpy())
    rate = settings.rate if settings.rate is not None else pick_rate(picks, settings.pick)
    metrics = {"rate": rate, "minimum": picks.minimum, "steepest": picks.steepest, "valley": picks.valley}
    how = "given in params.yaml" if settings.rate is not None else f"rule: {settings.pick}"
    run.log("rate %.2e (%s); lowest loss at %.2e", rate, how, picks.minimum)

    curve.to_csv(run.path("curve.csv"), index=False)
    save_png(lr_find_plot(curve, metrics), run.path("lr_find.png"))
    return metrics
