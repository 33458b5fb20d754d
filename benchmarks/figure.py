"""The figure of docs/performance.md: how many times as fast as fastai, and how near to the ceiling."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.compare import CASES
from unfreeze.plotting import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, save_png

Result = dict[str, Any]
COLOURS, MARKERS = (BLUE, SKY, RED, ORANGE, GREEN, PURPLE), "osD^v"
SHARES = ("precompute", "augmented frozen epoch", "epoch of the whole network")


def draw(results: Path, path: Path) -> None:
    """Draw every comparison in a folder of results; nothing where there is none.

    A row for each case, a point for each comparison that has it: coloured by network and size, shaped by the images.
    """
    read = [json.loads(file.read_text()) for file in sorted(results.glob("*.json"))]
    found = [result for result in read if {"speed", "accuracy"} & set(result)]
    if not found:
        return
    colours = dict(zip(sorted({_network(result) for result in found}), COLOURS, strict=False))
    markers = dict(zip(sorted({_images(result) for result in found}), MARKERS, strict=False))
    figure = Figure((10.5, 5.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))

    def points(axes: Axes, rows: dict[str, Callable[[Result], float | None]], unit: str) -> None:
        for row, value in enumerate(rows.values()):
            having = [(result, x) for result in found if (x := value(result)) is not None]
            step = 0.6 / max(len(having) - 1, 1)
            for number, (result, x) in enumerate(having):
                axes.plot(
                    x, row - 0.3 + number * step if len(having) > 1 else row, markers[_images(result)],
                    color=colours[_network(result)], markersize=6,
                )  # fmt: skip
            if having:
                values = [x for _, x in having]
                ends = [f"{x:.1f}" if unit == "x" else f"{x:.0f}" for x in (min(values), max(values))]
                axes.text(1.02, row, " - ".join(dict.fromkeys(ends)), transform=axes.get_yaxis_transform(),
                          va="center", fontsize=8)  # fmt: skip
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        for edge in range(1, len(rows)):
            axes.axhline(edge - 0.5, color="#e6e6e6", linewidth=0.8)
        axes.axvline(1 if unit == "x" else 100, color=GREY, linewidth=1)
        axes.set_xlim(0, 1.06 * axes.dataLim.x1)
        axes.spines[["top", "right"]].set_visible(False)

    points(
        left,
        {what: lambda result, case=case: _at(result, "speed", "cases", case, "ratio") for case, what in CASES.items()}
        | {"images to evaluated model": lambda result: _at(result, "accuracy", "ratio")},
        "x",
    )
    left.set_xlabel("times as fast as fastai")

    def share(name: str) -> Callable[[Result], float | None]:
        return lambda result: (found := _at(result, "speed", "shares", name, "share")) and 100 * found

    points(right, {name: share(name) for name in SHARES}, "%")
    right.set_xlabel("share of the ceiling, %")
    legend = [
        Line2D([], [], color=colour, marker="s", linestyle="", label=name) for name, colour in colours.items()
    ] + [Line2D([], [], color=GREY, marker=marker, linestyle="", label=name) for name, marker in markers.items()]
    figure.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False)
    save_png(figure, path)


def _network(result: Result) -> str:
    settings = result["about"]["settings"]
    return f"{settings['backbone']['name'].split(':')[1]}, {settings['data']['image_size']} px"


def _images(result: Result) -> str:
    return result["about"]["settings"]["data"]["source"].removeprefix("sample:")


def _at(found: Any, *keys: str) -> Any:
    for key in keys:
        found = (found or {}).get(key)
    return found
