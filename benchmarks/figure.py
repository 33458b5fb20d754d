"""The figure of docs/performance.md: speed relative to fastai, and shares of the ceiling."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.compare import ALL, CASES, OURS, PARTS
from unfreeze.reports.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, save_png

Result = dict[str, Any]
COLOURS, MARKERS = (BLUE, SKY, RED, ORANGE, GREEN, PURPLE), "osD^v"
Rows = dict[str, tuple[str, ...]]
RATIOS: Rows = {
    **{what: ("speed", case, "ratio") for case, what in CASES.items()},
    "images to evaluated model, all layers": ("accuracy", "ratios", ALL),
    "the same, with the settings' layers": ("accuracy", "ratios", OURS),
}
SHARES: Rows = {
    name: ("shares", name, "share")
    for rates in PARTS.values()
    for name in rates
    if name != "reading packed pixels"  # many times the ceiling
}
"""Rows of the figure's two halves, and the keys of their values in a result."""


def draw(results: Path, path: Path) -> None:
    """Draw those results in a folder whose files have the name that `result_name` returns; if none has, do nothing.

    Each case is a row, and each result a point: the colour shows network and image size, the marker the images.
    """
    read = {file.stem: json.loads(file.read_text()) for file in sorted(results.glob("*.json"))}
    found = [result for name, result in read.items() if isinstance(result, dict)
             and {"speed", "shares", "accuracy"} & set(result) and name == result_name(_settings(result))]  # fmt: skip
    if not found:
        return
    colours = dict(zip(sorted({_network(result) for result in found}), COLOURS, strict=False))
    markers = dict(zip(sorted({_images(result) for result in found}), MARKERS, strict=False))
    figure = Figure((10.5, 5.2), dpi=110, layout="constrained")
    halves = figure.subplots(1, 2, width_ratios=(1.15, 1))
    texts = (("{:.1f}", "times as fast as fastai"), ("{:.0%}", "share of the ceiling"))
    for axes, rows, (format_, unit) in zip(halves, (RATIOS, SHARES), texts, strict=True):
        for row, keys in enumerate(rows.values()):
            points = [(result, x) for result in found if (x := _at(result, *keys)) is not None]
            for (result, x), y in zip(points, np.linspace(row - 0.3, row + 0.3, len(points) + 2)[1:-1], strict=True):
                axes.plot(x, y, markers[_images(result)], color=colours[_network(result)], markersize=6)
            if points:
                lowest, highest = (format_.format(end([x for _, x in points])) for end in (min, max))
                axes.text(1.02, row, lowest if lowest == highest else f"{lowest} - {highest}",
                          transform=axes.get_yaxis_transform(), va="center", fontsize=8)  # fmt: skip
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        for edge in range(1, len(rows)):
            axes.axhline(edge - 0.5, color="#e6e6e6", linewidth=0.8)
        axes.axvline(1, color=GREY, linewidth=1)
        axes.set_xlim(0, 1.06 * axes.dataLim.x1)
        axes.set_xlabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
    legend = [
        Line2D([], [], color=colour, marker="s", linestyle="", label=name) for name, colour in colours.items()
    ] + [Line2D([], [], color=GREY, marker=marker, linestyle="", label=name) for name, marker in markers.items()]
    figure.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False)
    save_png(figure, path)


def result_name(settings: Any) -> str:
    """File name, without ``.json``, for results of the default settings with these images, network and image size.

    Args:
        settings: all settings, as a mapping of sections.
    """
    source = Path(settings["data"]["source"].removeprefix("sample:")).name
    return f"{source}-{settings['backbone']['name'].split(':')[1]}-{settings['data']['image_size']}"


def _network(result: Result) -> str:
    settings = _settings(result)
    return f"{settings['backbone']['name'].split(':')[1]}, {settings['data']['image_size']} px"


def _images(result: Result) -> str:
    return _settings(result)["data"]["source"].removeprefix("sample:")


def _settings(result: Result) -> Any:
    return next(iter(result["about"].values()))["settings"]  # any part: all have the same images, network and size


def _at(found: Any, *keys: str) -> Any:
    for key in keys:
        found = (found or {}).get(key)
    return found
