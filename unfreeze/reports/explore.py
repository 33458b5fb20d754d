"""The exploration report: a description of the images, before any training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from unfreeze.data.packed import Greys, PackedImages
from unfreeze.reports.html import render
from unfreeze.reports.plots import balance_plot, greys_plot, sizes_plot

FEW_LEVELS = 16
"""If 99 % of the pixels are shown in fewer than this many of 256 greys, outliers may determine the range of greys."""
SHOWN_CLASSES, SHOWN_SAMPLES, SHOWN_PAIRS, SHOWN_FILES, FEW = 30, 6, 12, 200, 30
SPLITS = ("train", "valid", "test")


def explore_metrics(packed: PackedImages, found: pd.DataFrame, duplicates: pd.DataFrame) -> dict[str, float]:
    """Metrics of the exploration.

    Args:
        packed: the images.
        found: a row per image found, with a reason if it was set aside.
        duplicates: pairs, as `unfreeze.data.duplicates.find_duplicates` gives them.
    """
    counts = packed.table["label"].value_counts()
    return {
        "images": len(packed),
        "classes": len(packed.classes),
        "broken": int((found["reason"] != "").sum()),
        "exact_duplicates": int((duplicates["kind"] == "exact").sum()),
        "near_duplicates": int((duplicates["kind"] == "near").sum()),
        "leaks": int(duplicates["leak"].sum()),
        "conflicts": int(duplicates["conflict"].sum()),
        "largest_to_smallest_class": float(counts.max() / counts.min()),
    }


def explore_report(
    packed: PackedImages, found: pd.DataFrame, duplicates: pd.DataFrame, source: str, notes: Sequence[str] = ()
) -> str:
    """The report as HTML.

    Arguments as for `explore_metrics`; ``source`` as in the settings, ``notes`` on how it was understood.
    """
    metrics = explore_metrics(packed, found, duplicates)
    remarks = packed.table[packed.table["remark"] != ""]
    return render(
        "explore.html",
        source=source,
        numbers=_numbers(packed, metrics),
        notes=[*notes, *_notes(packed, metrics)],
        balance=_balance(packed),
        sizes=_sizes(packed),
        greys=packed.greys and _greys(packed.greys),
        samples=_samples(packed),
        unseen_classes=max(0, len(packed.classes) - SHOWN_CLASSES),
        duplicates=None if duplicates.empty else _duplicates(packed, duplicates),
        remarks=_files(remarks, "remark"),
        broken=_files(found[found["reason"] != ""], "reason"),
    )


def _numbers(packed: PackedImages, metrics: Mapping[str, float]) -> list[tuple[str, str, str]]:
    splits = packed.table["split"].value_counts()
    parts = ", ".join(f"{splits[name]:,} {name}" for name in SPLITS if name in splits)
    duplicates = metrics["exact_duplicates"] + metrics["near_duplicates"]
    times = f"largest {metrics['largest_to_smallest_class']:.1f} times the smallest"
    return [
        (f"{len(packed):,}", "images", parts),
        (f"{len(packed.classes)}", "classes", times),
        (f"{duplicates:.0f}", "pairs of duplicates", f"{metrics['leaks']:.0f} between splits"),
        (f"{metrics['broken']:.0f}", "files set aside", "could not be read"),
    ]


def _notes(packed: PackedImages, metrics: Mapping[str, float]) -> list[str]:
    """Sentences on what needs attention."""
    notes = []
    counts = packed.table["label"].value_counts(sort=False)
    tiny = counts[counts < FEW].sort_values(kind="stable")
    if metrics["largest_to_smallest_class"] >= 5:
        notes.append(
            "The classes are far from balanced: look at each class's recall and at macro F1, not at accuracy alone."
        )
    if len(tiny) == 1:
        notes.append(f"The class {tiny.index[0]} has only {tiny.iloc[0]} images: its metrics are imprecise.")
    elif len(tiny):
        notes.append(
            f"{len(tiny)} classes have fewer than {FEW} images each, {tiny.index[0]} only {tiny.iloc[0]}: their "
            "metrics are imprecise."
        )
    if metrics["leaks"]:
        notes.append(
            f"{metrics['leaks']:.0f} pairs of exact or near duplicates lie in different splits: if they truly show the "
            "same, the network is tested on its training images. Remove one of each pair, or give both the same group."
        )
    if metrics["conflicts"]:
        notes.append(
            f"{metrics['conflicts']:.0f} pairs of duplicates have different labels: one of the two may be wrong."
        )
    long = int((packed.sizes.max(1) > 2.5 * packed.sizes.min(1)).sum())
    if long:
        notes.append(
            f"Images more than 2.5 times as long as wide: {long}. The network sees their middle square, TTA sees the rest."
        )
    for remark, count in packed.table.loc[packed.table["remark"] != "", "remark"].value_counts().items():
        notes.append(f"{count:,} images are {remark}.")
    levels = _levels(packed.greys)
    if levels is not None and levels < FEW_LEVELS:
        notes.append(
            f"99 % of the pixels with greys of more than 8 bits are shown in {levels} of 256 greys: look at their "
            "histogram, and set data.grey_range to [low, high] of the relevant values."
        )
    if "test" not in set(packed.table["split"]):
        notes.append("There is no test split: the retrained model cannot be evaluated.")
    return notes


def _balance(packed: PackedImages) -> dict[str, Any]:
    counts = packed.table.groupby(["label", "split"]).size().unstack(fill_value=0)
    counts = counts.reindex(columns=[name for name in SPLITS if name in counts])
    counts["all"] = counts.sum(axis=1)
    rows = [(label, *(int(n) for n in row)) for label, row in zip(counts.index, counts.to_numpy(), strict=True)]
    return {"figure": balance_plot(packed.table), "header": ["class", *counts.columns], "rows": rows}


def _sizes(packed: PackedImages) -> dict[str, Any]:
    width, height = (pd.to_numeric(packed.table[name]) for name in ("width", "height"))
    measured = (("width in px", width, 0), ("height in px", height, 0), ("width / height", width / height, 2))
    rows = [
        (name, *(f"{values.quantile(q):.{digits}f}" for q in (0, 0.25, 0.5, 0.75, 1)))
        for name, values, digits in measured
    ]
    return {"figure": sizes_plot(width, height, packed.image_size), "rows": rows}


def _greys(greys: Greys) -> dict[str, Any]:
    black, white = greys.range
    if not greys.images:
        text = f"None of the examined images has greys of more than 8 bits: {black:g} would be black, {white:g} white."
        return {"text": text, "figure": None}
    text = (
        f"In the {greys.images:,} examined images, values lie between {greys.found[0]:g} and {greys.found[1]:g}. "
        f"{black:g} is shown as black and {white:g} as white in every image (data.grey_range), in predictions too."
    )
    return {"text": text, "figure": greys_plot(greys.counts, greys.found, greys.range)}


def _levels(greys: Greys | None) -> int | None:
    """The smallest number of the 256 displayed greys that hold 99 % of the pixels; None without a histogram."""
    if greys is None or not sum(greys.counts):
        return None
    centres = np.linspace(*greys.found, 2 * len(greys.counts) + 1)[1::2]
    black, white = greys.range
    shown = ((centres - black) * (255 / (white - black)) + 0.5).clip(0, 255).astype(int)
    pixels = np.sort(np.bincount(shown, greys.counts, 256))[::-1]
    return int(np.searchsorted(pixels.cumsum(), 0.99 * pixels.sum()) + 1)


def _samples(packed: PackedImages) -> list[tuple[str, list[Any]]]:
    rng = np.random.default_rng(0)
    samples = []
    for number, name in list(enumerate(packed.classes))[:SHOWN_CLASSES]:
        rows = rng.permutation(np.flatnonzero(packed.labels == number))[:SHOWN_SAMPLES]
        samples.append((name, [(packed[row], _lines(packed, row)) for row in rows]))
    return samples


def _lines(packed: PackedImages, row: int) -> tuple[str, str]:
    image = packed.table.iloc[row]
    return str(image["path"]).rsplit("/", 1)[-1], str(image["split"])


def _duplicates(packed: PackedImages, duplicates: pd.DataFrame) -> dict[str, Any]:
    kinds = ((kind, duplicates[duplicates["kind"] == kind]) for kind in ("exact", "near"))
    rows = [(kind, len(some), int(some["leak"].sum()), int(some["conflict"].sum())) for kind, some in kinds]

    def caption(row: int) -> str:
        image = packed.table.iloc[row]
        return f"{image['path']} ({image['label']}, {image['split']})"

    shown = [
        (packed[a], packed[b], (_what(pair), caption(a), caption(b)))
        for pair in duplicates.head(SHOWN_PAIRS).to_dict("records")
        for a, b in [(pair["row_a"], pair["row_b"])]
    ]
    return {"rows": rows, "pairs": shown, "unseen": len(duplicates) - len(shown)}


def _what(pair: Mapping[Any, Any]) -> str:
    return pair["kind"] + ", between splits" * pair["leak"] + ", different labels" * pair["conflict"]


def _files(table: pd.DataFrame, column: str) -> dict[str, Any]:
    """Rows of file, class and the value in a column."""
    rows = list(table[["path", "label", column]].head(SHOWN_FILES).itertuples(index=False, name=None))
    return {"rows": rows, "unseen": len(table) - len(rows)}
