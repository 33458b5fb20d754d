"""Log of the training steps: one line per epoch, curves while they run, tables afterwards."""

import math
from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from pipeline.step import Run
from unfreeze.training.checkpoints import Progress
from unfreeze.training.history import History
from unfreeze.training.loop import Callbacks

VALID = ["valid_loss", "valid_calibrated_loss", "valid_accuracy"]
EPOCH = ["epoch", "cycle", "train_loss", *VALID, "rate"]
BATCH = ["iteration", "rate", "loss"]
POINTS = 1000
"""Largest number of points of a curve in MLflow, which shows no more; each point is sent and stored."""


def callbacks(
    run: Run, epochs: int, batches: int, phase: str = "", cycle: Callable[[int], None] = lambda number: None
) -> Callbacks:
    """Training callbacks: log a line per epoch, and send every epoch and up to `POINTS` batches to MLflow.

    When a training is resumed, the epochs and batches before the interruption are sent as well. The table `batches.csv`
    has all batches.

    Args:
        run: the step's execution.
        epochs: largest number of epochs, for the log and for the choice of the batches that are sent.
        batches: number of batches in an epoch.
        phase: name of this part of the step, if it has several.
        cycle: called at the end of each cycle with its number (from 0).
    """
    prefix = f"{phase}/" if phase else ""

    every = max(1, math.ceil(epochs * batches / POINTS))

    def tell_batches(rows: Sequence[Mapping[str, float]]) -> None:
        for row in rows:
            if row["iteration"] % every:
                continue
            run.tracker.curve({prefix + "rate": row["rate"], prefix + "loss": row["loss"]}, int(row["iteration"]))

    def epoch(row: Mapping[str, float]) -> None:
        text = f"{phase} " if phase else ""
        text += (
            f"epoch {row['epoch'] + 1:.0f}/{epochs}, cycle {row['cycle'] + 1:.0f}: train loss {row['train_loss']:.4f}"
        )
        if "valid_loss" in row:
            text += f", valid loss {row['valid_loss']:.4f}"
            if "valid_calibrated_loss" in row:
                text += f" ({row['valid_calibrated_loss']:.4f} calibrated)"
            text += f", accuracy {row['valid_accuracy']:.4f}"
        run.log("%s, rate up to %.2e", text, row["rate"])
        curves_of(row)

    def curves_of(row: Mapping[str, float]) -> None:
        curves = {k: row[k] for k in ("train_loss", *VALID) if k in row}
        run.tracker.curve({prefix + k: v for k, v in curves.items()}, int(row["epoch"]))

    def resumed(progress: Progress) -> None:
        where = "after its end" if progress.done else f"in epoch {progress.epoch + 1}, batch {progress.batch + 1}"
        run.log("%sgoes on %s, from a checkpoint", f"{phase} " if phase else "", where)
        tell_batches(progress.history.batches)
        for row in progress.history.epochs:
            curves_of(row)

    return Callbacks(tell_batches, epoch, cycle, resumed, run.checkpoint(phase or "training"))


def keep(run: Run, history: History) -> dict[str, float]:
    """Write a training's tables. `evaluate` plots them, so that changing a plot needs no new training.

    Returns:
        Metrics of the cycle whose weights were kept; its number counts from 1, as in the log. Without epochs, only
        their number.
    """
    for name, rows, columns in (("history.csv", history.epochs, EPOCH), ("batches.csv", history.batches, BATCH)):
        pd.DataFrame(rows).reindex(columns=columns).to_csv(run.path(name), index=False)
    if not history.epochs:
        return {"epochs": 0}
    kept = [row for row in history.epochs if row["cycle"] == history.best_cycle][-1]
    metrics = {name: kept[name] for name in ("train_loss", *VALID) if name in kept}
    return metrics | {"epochs": len(history.epochs), "best_cycle": history.best_cycle + 1}
