"""The exploration report: what the images are, before anything is trained on them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from unfreeze.data.packed import Greys, PackedImages
from unfreeze.reports.html import Section, cards, folded, gallery, heading, page, pairs, paragraph, plot, table
from unfreeze.reports.plots import balance_plot, greys_plot, sizes_plot

FEW_LEVELS = 16
"""If 99 % of the pixels fall into fewer of the 256 greys than this, a few outliers may determine the range of greys."""
SHOWN_CLASSES, SHOWN_SAMPLES, SHOWN_PAIRS, SHOWN_BROKEN, SHOWN_ROWS, FEW = 30, 6, 12, 200, 20, 30


def explore_metrics(packed: PackedImages, found: pd.DataFrame, duplicates: pd.DataFrame) -> dict[str, float]:
    """Numbers of the exploration.

    Args:
        packed: the images.
        found: a row per image found, with a reason where it was set aside.
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
    """The page. Arguments as for `explore_metrics`; ``source`` as the settings name it, and notes on how it was understood."""
    metrics = explore_metrics(packed, found, duplicates)
    remarks = packed.table[packed.table["remark"] != ""]
    sections = [
        Section("At a glance", _glance(packed, metrics, notes)),
        Section("Classes and splits", _balance(packed)),
        Section("Sizes", _sizes(packed)),
        *([Section("Greys of more than 8 bits", _greys(packed.greys))] if packed.greys else []),
        Section("Samples", _samples(packed)),
        Section("Duplicates and leaks", _duplicates(packed, duplicates)),
        *([Section("Remarks", _remarks(remarks))] if len(remarks) else []),
        Section("Broken files", _broken(found)),
    ]
    return page("The images", f"{source}: what there is, before anything is trained", sections)


def _glance(packed: PackedImages, metrics: dict[str, float], found: Sequence[str]) -> str:
    splits = packed.table["split"].value_counts()
    parts = ", ".join(f"{splits[name]:,} {name}" for name in ("train", "valid", "test") if name in splits)
    duplicates = metrics["exact_duplicates"] + metrics["near_duplicates"]
    text = cards(
        [
            (f"{len(packed):,}", "images", parts),
            (
                f"{len(packed.classes)}",
                "classes",
                f"largest {metrics['largest_to_smallest_class']:.1f} times the smallest",
            ),
            (f"{duplicates:.0f}", "pairs of duplicates", f"{metrics['leaks']:.0f} between splits"),
            (f"{metrics['broken']:.0f}", "files set aside", "could not be read"),
        ]
    )
    notes = list(found)
    counts = packed.table["label"].value_counts(sort=False)
    tiny = counts[counts < FEW].sort_values(kind="stable")
    if metrics["largest_to_smallest_class"] >= 5:
        notes.append(
            "The classes are far from balanced: look at each class's recall and at macro F1, not at accuracy alone."
        )
    if len(tiny) == 1:
        notes.append(f"The class {tiny.index[0]} has only {tiny.iloc[0]} images: what is measured of it is rough.")
    elif len(tiny):
        notes.append(
            f"{len(tiny)} classes have fewer than {FEW} images each, {tiny.index[0]} only {tiny.iloc[0]}: what is "
            "measured of them is rough."
        )
    if metrics["leaks"]:
        notes.append(
            f"{metrics['leaks']:.0f} pairs of exact or near duplicates lie in different splits: where they truly show the "
            "same, the network is tested on what it was trained on. Remove one of each pair, or give both the same group."
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
            f"Of greys of more than 8 bits, 99 % of the pixels are shown in {levels} of 256 greys: look at their histogram, "
            "and set data.grey_range to [low, high] of what matters."
        )
    if "test" not in splits:
        notes.append("There is no test split: the retrained model cannot be evaluated.")
    if not notes:
        return text + paragraph("Nothing here asks for attention.", "note fine")
    return text + "".join(paragraph(note, "note") for note in notes)


def _balance(packed: PackedImages) -> str:
    counts = packed.table.groupby(["label", "split"]).size().unstack(fill_value=0)
    counts = counts.reindex(columns=[s for s in ("train", "valid", "test") if s in counts])
    counts["all"] = counts.sum(axis=1)
    rows = [(label, *(int(n) for n in row)) for label, row in zip(counts.index, counts.to_numpy(), strict=True)]
    text = table(["class", *counts.columns], rows)
    if len(rows) > SHOWN_ROWS:
        text = folded(f"All {len(rows)} classes", text)
    return plot(balance_plot(packed.table), "images per class and split") + text


def _sizes(packed: PackedImages) -> str:
    width, height = (pd.to_numeric(packed.table[name]) for name in ("width", "height"))
    rows = [
        (name, *(f"{values.quantile(q):.{digits}f}" for q in (0, 0.25, 0.5, 0.75, 1)))
        for name, values, digits in (
            ("width in px", width, 0),
            ("height in px", height, 0),
            ("width / height", width / height, 2),
        )
    ]
    text = table(["", "smallest", "25 %", "median", "75 %", "largest"], rows)
    figure = sizes_plot(width, height, packed.image_size)
    return text + plot(figure, "width and height of the images")


def _greys(greys: Greys) -> str:
    black, white = greys.range
    if not greys.images:
        return paragraph(f"None of the images that were looked at has such: {black:g} would be black, {white:g} white.")
    text = paragraph(
        f"In the {greys.images:,} images that were looked at, values lie between {greys.found[0]:g} and {greys.found[1]:g}. "
        f"{black:g} is shown as black and {white:g} as white in every image (data.grey_range), in predictions too."
    )
    return text + plot(greys_plot(greys.counts, greys.found, greys.range), "histogram of the greys")


def _levels(greys: Greys | None) -> int | None:
    """The smallest number of the 256 displayed greys that hold 99 % of the pixels; None without a histogram."""
    if greys is None or not sum(greys.counts):
        return None
    centres = np.linspace(*greys.found, 2 * len(greys.counts) + 1)[1::2]
    black, white = greys.range
    shown = ((centres - black) * (255 / (white - black)) + 0.5).clip(0, 255).astype(int)
    pixels = np.sort(np.bincount(shown, greys.counts, 256))[::-1]
    return int(np.searchsorted(pixels.cumsum(), 0.99 * pixels.sum()) + 1)


def _samples(packed: PackedImages) -> str:
    rng = np.random.default_rng(0)
    parts = []
    for number, name in list(enumerate(packed.classes))[:SHOWN_CLASSES]:
        rows = rng.permutation(np.flatnonzero(packed.labels == number))[:SHOWN_SAMPLES]
        parts.append(heading(name) + gallery((packed[row], _lines(packed, row)) for row in rows))
    if len(packed.classes) > SHOWN_CLASSES:
        parts.append(paragraph(f"And {len(packed.classes) - SHOWN_CLASSES} classes more.", "soft"))
    return "".join(parts)


def _lines(packed: PackedImages, row: int) -> tuple[str, str]:
    image = packed.table.iloc[row]
    return str(image["path"]).rsplit("/", 1)[-1], str(image["split"])


def _duplicates(packed: PackedImages, duplicates: pd.DataFrame) -> str:
    if duplicates.empty:
        return paragraph("No duplicates, neither exact nor near ones.", "note fine")
    about = paragraph(
        "Exact duplicates have the same pixels; near ones look the same (resized, or saved anew). Exact duplicates are "
        "never dealt to different splits; where the splits were given, they are left as they are.", "soft"
    )  # fmt: skip
    exact, near = ((duplicates["kind"] == kind) for kind in ("exact", "near"))
    summary = table(
        ["", "pairs", "between splits", "with different labels"],
        [
            (name, int(which.sum()), int(duplicates["leak"][which].sum()), int(duplicates["conflict"][which].sum()))
            for name, which in (("exact", exact), ("near", near))
        ],
    )

    def caption(row: int) -> str:
        image = packed.table.iloc[row]
        return f"{image['path']} ({image['label']}, {image['split']})"

    shown = [
        (packed[a], packed[b], (_what(pair), caption(a), caption(b)))
        for pair in duplicates.head(SHOWN_PAIRS).to_dict("records")
        for a, b in [(pair["row_a"], pair["row_b"])]
    ]
    more = len(duplicates) - len(shown)
    return about + summary + pairs(shown) + (paragraph(f"And {more} pairs more.", "soft") if more else "")


def _what(pair: Mapping[Any, Any]) -> str:
    return pair["kind"] + ", between splits" * pair["leak"] + ", different labels" * pair["conflict"]


def _remarks(remarks: pd.DataFrame) -> str:
    rows = list(remarks[["path", "label", "remark"]].head(SHOWN_BROKEN).itertuples(index=False, name=None))
    more = len(remarks) - len(rows)
    return table(["file", "class", "remark"], rows) + (paragraph(f"And {more} more.", "soft") if more else "")


def _broken(found: pd.DataFrame) -> str:
    broken = found[found["reason"] != ""]
    if broken.empty:
        return paragraph("Every file could be read.", "note fine")
    rows = list(broken[["path", "label", "reason"]].head(SHOWN_BROKEN).itertuples(index=False, name=None))
    more = len(broken) - len(rows)
    text = paragraph("These files were set aside; the images above are without them.")
    return text + table(["file", "class", "reason"], rows) + (paragraph(f"And {more} more.", "soft") if more else "")
