"""The figure of docs/performance.md: how many times as fast as fastai, and how near to the ceiling."""

import json
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.compare import CASES
from unfreeze.plotting import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, save_png

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)


def draw(results: Path, path: Path) -> None:
    """Draw every comparison in a folder of results; nothing where there is none."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted(results.glob("*.json"))}
    found = {name: result for name, result in found.items() if "speed" in result}
    if not found:
        return
    figure = Figure((9.5, 1.6 + 0.5 * len(found) + 3.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    cases = dict(CASES)
    if any("accuracy" in result for result in found.values()):
        cases["recipe"] = "images to evaluated model"
    shares = list(next(iter(found.values()))["speed"]["shares"])[:3]
    height = min(0.8 / len(found), 0.5)
    for number, (name, result) in enumerate(found.items()):
        ratios = {case: result["speed"]["cases"][case]["ratio"] for case in CASES}
        if "accuracy" in result:
            ratios["recipe"] = result["accuracy"]["ratio"]
        colour = COLOURS[number % len(COLOURS)]
        shift = (number - (len(found) - 1) / 2) * height
        places = [list(cases).index(case) + shift for case in ratios]
        bars = left.barh(places, list(ratios.values()), height, color=colour, label=name)
        left.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        bars = right.barh(
            [i + shift for i in range(len(shares))],
            [100 * result["speed"]["shares"][share]["share"] for share in shares],
            height, color=colour,
        )  # fmt: skip
        for label in right.bar_label(bars, fmt="%.0f %%", padding=3, fontsize=8):
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8})  # the ceiling's line goes behind it
    left.set_yticks(range(len(cases)), list(cases.values()))
    left.axvline(1, color=GREY, linewidth=1)
    left.set_xlabel("times as fast as fastai")
    right.set_yticks(range(len(shares)), shares)
    right.axvline(100, color=GREY, linewidth=1)
    right.set_xlabel("share of the ceiling, %")
    for axes in (left, right):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.15)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    save_png(figure, path)
