"""Plots in a common style; each function takes tables or arrays and returns a figure."""

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

# Okabe and Ito's colour-blind safe palette, and a grey.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#777777",
)
MOST_NUMBERED, MOST_NAMED, MOST_BARS = 15, 50, 30
OTHER_SCRIPTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans Devanagari", "Arial Unicode MS", "Microsoft YaHei")


def _figure(width: float, height: float, **several: Any) -> tuple[Figure, Any]:
    """A figure and its axes; ``several`` are arguments of `Figure.subplots`, for more than one."""
    figure = Figure((width, height), dpi=110, layout="constrained")
    axes = figure.subplots(**several)
    for one in np.atleast_1d(axes):
        one.spines[["top", "right"]].set_visible(False)
        one.grid(True, color="#e6e6e6", linewidth=0.8)
        one.set_axisbelow(True)
    return figure, axes


def _fonts() -> list[str]:
    """The font of every plot, and installed fallback fonts, as class names may be in any script."""
    installed = set(fontManager.get_font_names())
    return ["DejaVu Sans", *(name for name in OTHER_SCRIPTS if name in installed)]


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def save_png(figure: Figure, path: Path | io.BytesIO) -> None:
    """Write a figure as PNG; the same figure gives the same bytes."""
    with warnings.catch_warnings():
        # A character that no installed font has is drawn as a box, which needs no warning in the log.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, format="png", metadata={"Software": None})


def to_data_uri(figure: Figure) -> str:
    """A figure as a data URI, for a self-contained page."""
    buffer = io.BytesIO()
    save_png(figure, buffer)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def lr_find_plot(curve: pd.DataFrame, picks: Mapping[str, float | None]) -> Figure:
    """Change of the loss against the learning rate, with the picked rate and the points it was selected from.

    Args:
        curve: columns rate, change, smoothed and error, as `unfreeze.training.lr_curve.make_curve` gives them.
        picks: rate, and the points of `unfreeze.training.lr_curve.Picks`, as learning rates; None and non-finite ones are
            left out.
    """
    figure, axes = _figure(7.0, 4.4)
    rate, smoothed, error = curve["rate"], curve["smoothed"], curve["error"]
    axes.plot(rate, curve["change"], color=GREY, alpha=0.4, linewidth=1, label="one batch")
    axes.fill_between(
        rate, smoothed - error, smoothed + error, color=BLUE, alpha=0.2, linewidth=0, label="standard error"
    )
    axes.plot(rate, smoothed, color=BLUE, linewidth=2, label="smoothed")
    axes.set_xscale("log")
    low, high = smoothed.min(), smoothed.max()
    space = 0.1 * max(high - low, 0.1)
    axes.set_ylim(low - space, high + space)
    for name, colour, marker in (
        ("minimum", RED, "v"), ("midpoint", SKY, "^"), ("divergence", ORANGE, "o"), ("steepest", GREEN, "s"),
        ("valley", PURPLE, "D"),
    ):  # fmt: skip
        at = picks.get(name)
        if at is not None and np.isfinite(at):
            height = np.interp(np.log(at), np.log(rate), smoothed)
            axes.plot(at, height, marker, color=colour, markersize=8, label=f"{name} {at:.1e}", zorder=3)
    picked = picks.get("rate")
    if picked is not None and np.isfinite(picked):
        axes.axvline(picked, color=ORANGE, linewidth=2, linestyle="--", label=f"picked {picked:.1e}")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss minus loss of the starting weights")
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def reliability_plot(before: pd.DataFrame, after: pd.DataFrame) -> Figure:
    """Reliability diagram: accuracy of the predictions against their confidence, before and after calibration.

    Args:
        before, after: rows of confidence, accuracy and its interval from low to high, as
            `unfreeze.evaluation.metrics.reliability` gives them.
    """
    figure, axes = _figure(5.6, 5.0)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="perfectly calibrated")
    for table, colour, name in ((before, ORANGE, "before calibration"), (after, BLUE, "after calibration")):
        accuracy = table["accuracy"]
        # Rounding may make these slightly negative if all or none are right.
        errors = np.maximum([accuracy - table["low"], table["high"] - accuracy], 0)
        axes.errorbar(
            table["confidence"], accuracy, errors, fmt="o", color=colour, markersize=6, elinewidth=1.2, label=name
        )
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("confidence (mean probability of the predicted class)")
    axes.set_ylabel("accuracy, with its 95 % interval")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def rates_plot(batches: pd.DataFrame) -> Figure:
    """The learning rate over the iterations, and the loss of each batch beneath it."""
    figure, (above, below) = _figure(7.0, 4.6, nrows=2, sharex=True)
    above.plot(batches["iteration"], batches["rate"], color=ORANGE)
    above.set_ylabel("learning rate")
    above.set_ylim(bottom=0)
    above.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    below.plot(batches["iteration"], batches["loss"], color=GREY, alpha=0.5, linewidth=1)
    smooth = batches["loss"].rolling(max(1, len(batches) // 25), center=True, min_periods=1).mean()
    below.plot(batches["iteration"], smooth, color=BLUE, linewidth=2)
    below.set_ylabel("training loss")
    below.set_xlabel("iteration")
    return figure


def learning_curves_plot(history: pd.DataFrame, best_cycle: int | None = None) -> Figure:
    """Loss and accuracy after each epoch, with the ends of cycles and the cycle whose weights were kept.

    Args:
        history: columns epoch, cycle, train_loss, valid_loss, valid_accuracy, and perhaps valid_calibrated_loss; the
            last three may be empty.
        best_cycle: number of the cycle that was kept, from 0; None to mark none.
    """
    figure, axes = _figure(7.0, 3.4, ncols=2)
    for one in axes:
        one.set_xlabel("epoch")
        one.xaxis.set_major_locator(MaxNLocator(integer=True))
        ends = history.groupby("cycle")["epoch"].max() + 1
        for cycle, end in ends.items():
            best = cycle == best_cycle
            label = "kept" if best else None
            style = (
                {"color": GREEN, "linewidth": 2, "linestyle": "--"} if best else {"color": "#bbbbbb", "linestyle": ":"}
            )
            one.axvline(end, **style, label=label, zorder=1)
    epochs = history["epoch"] + 1
    axes[0].plot(epochs, history["train_loss"], "o-", color=GREY, label="train", markersize=4)
    if history["valid_loss"].notna().any():
        axes[0].plot(epochs, history["valid_loss"], "o-", color=BLUE, label="valid", markersize=4)
        if "valid_calibrated_loss" in history:
            calibrated = history["valid_calibrated_loss"]
            axes[0].plot(epochs, calibrated, "o--", color=BLUE, alpha=0.6, label="valid, calibrated", markersize=3)
        axes[1].plot(epochs, history["valid_accuracy"], "o-", color=BLUE, markersize=4)
    else:
        axes[1].text(0.5, 0.5, "no validation split", ha="center", transform=axes[1].transAxes, color=GREY)
    axes[0].set_ylabel("loss")
    axes[1].set_ylabel("validation accuracy")
    axes[0].legend(frameon=False)
    return figure


def confusion_plot(matrix: NDArray[np.int64], classes: Sequence[str]) -> Figure:
    """Confusion matrix, coloured by the share of each row; with counts and percentages if there is room for them."""
    count = len(classes)
    side = min(9.4, 3.2 + 0.62 * count)
    figure = Figure((side + 1.0, side), dpi=110, layout="constrained")
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    # Without numbers in the cells, a few per cent must be seen by colour alone.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(1.0 if count <= MOST_NUMBERED else 0.4, 0, 1))
    if count <= MOST_NUMBERED:
        for (i, j), value in np.ndenumerate(matrix):
            colour = "white" if shares[i, j] > 0.5 else "#222222"
            text = f"{value}\n{shares[i, j]:.0%}" if value else "0"
            axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=11 if count <= 4 else 8)
    every = -(-count // MOST_NAMED)
    places = range(0, count, every)
    names = [_short(classes[i], 22) for i in places]
    size, fonts = 10 if count <= MOST_NUMBERED else 8, _fonts()
    turn = 0 if count <= 3 and max(map(len, names)) <= 14 else 90
    axes.set_xticks(places, names, rotation=turn, fontsize=size, fontfamily=fonts, parse_math=False)
    axes.set_yticks(places, names, fontsize=size, fontfamily=fonts, parse_math=False)
    if every > 1:
        axes.set_title(f"one class in {every} is named; row and column order are the table's", fontsize=9, color=GREY)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    bar = figure.colorbar(image, ax=axes, shrink=0.7, format=FuncFormatter(lambda share, _: f"{share:.0%}"))
    bar.set_label("share of the true class")
    return figure


def balance_plot(table: pd.DataFrame) -> Figure:
    """Images per class and split, from a table with columns label and split.

    If there are more than `MOST_BARS` classes, only the largest and smallest are shown.
    """
    counts = table.groupby(["label", "split"]).size().unstack(fill_value=0)
    counts = counts[[split for split in ("train", "valid", "test") if split in counts]]
    counts = counts.loc[counts.sum(axis=1).sort_values(kind="stable").index]
    total = len(counts)
    if total > MOST_BARS:
        counts = pd.concat([counts.head(MOST_BARS // 2), counts.tail(MOST_BARS // 2)])
    figure, axes = _figure(7.0, 1.2 + 0.28 * len(counts))
    if total > MOST_BARS:
        axes.axhline(MOST_BARS / 2 - 0.5, color=GREY, linewidth=1, linestyle="--")
        axes.annotate(
            f"{total - MOST_BARS} classes\nbetween", (1, MOST_BARS / 2 - 0.5), xycoords=("axes fraction", "data"),
            xytext=(4, 0), textcoords="offset points", va="center", fontsize=9, color=GREY,
        )  # fmt: skip
    left = np.zeros(len(counts))
    for split, colour in zip(counts.columns, (BLUE, ORANGE, GREEN), strict=False):
        axes.barh(range(len(counts)), counts[split], left=left, color=colour, label=split, height=0.7)
        left += counts[split].to_numpy()
    names = [_short(str(name), 30) for name in counts.index]
    axes.set_yticks(range(len(counts)), names, fontfamily=_fonts(), parse_math=False)
    axes.set_ylim(-0.6, len(counts) - 0.4)
    axes.set_xlabel("images")
    axes.grid(False, axis="y")
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def greys_plot(counts: Sequence[int], found: tuple[float, float], shown: tuple[float, float]) -> Figure:
    """Histogram of greys of more than 8 bits, on a logarithmic axis, with the values shown as black and as white.

    Args:
        counts: number of pixels in each bin; all bins have the same width.
        found: lower end of the first bin, and upper end of the last.
        shown: the values shown as black and as white.
    """
    figure, axes = _figure(7.0, 3.4)
    edges = np.linspace(*found, len(counts) + 1)
    axes.stairs(counts, edges, color=BLUE, fill=True, alpha=0.5)
    axes.set_yscale("log")
    for value, name in zip(shown, ("black", "white"), strict=True):
        axes.axvline(value, color=ORANGE, linewidth=1.5, linestyle="--")
        axes.annotate(f"{name}: {value:g}", (value, 1.01), xycoords=("data", "axes fraction"), ha="center", fontsize=9)
    axes.set(xlabel="value", ylabel="pixels")
    return figure


def sizes_plot(width: pd.Series, height: pd.Series, image_size: int) -> Figure:
    """Width and height of the original images; larger dots mean more images of that size."""
    sizes = pd.DataFrame({"width": width, "height": height}).value_counts().reset_index(name="count")
    figure, axes = _figure(5.4, 4.2)
    area = 12 + 200 * np.sqrt(sizes["count"] / sizes["count"].max())
    axes.scatter(sizes["width"], sizes["height"], s=area, color=BLUE, alpha=0.35, linewidth=0)
    top = 1.08 * max(sizes["width"].max(), sizes["height"].max())
    axes.plot([0, top], [0, top], color="#bbbbbb", linewidth=1, zorder=1)
    axes.axhline(image_size, color=ORANGE, linewidth=1, linestyle="--")
    axes.axvline(image_size, color=ORANGE, linewidth=1, linestyle="--", label=f"data.image_size, {image_size} px")
    axes.set(xlim=(0, top), ylim=(0, top), xlabel="width in pixels", ylabel="height in pixels", aspect="equal")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def histories_plot(histories: Mapping[str, pd.DataFrame]) -> Figure:
    """Validation accuracy over all epochs of the recipe, one training after the other."""
    figure, axes = _figure(7.0, 3.4)
    start = 0
    for (name, history), colour in zip(histories.items(), (GREY, ORANGE, BLUE), strict=False):
        epochs: Any = start + history["epoch"] + 1
        axes.plot(epochs, history["valid_accuracy"], "o-", color=colour, label=name, markersize=5)
        start = int(epochs.iloc[-1])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch of the recipe")
    axes.set_ylabel("validation accuracy")
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return figure
