"""Plots show their input: marks, labels and numbers are read back."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from unfreeze.evaluation.metrics import reliability
from unfreeze.reports.plots import (
    balance_plot,
    confusion_plot,
    histories_plot,
    learning_curves_plot,
    lr_find_plot,
    rates_plot,
    reliability_plot,
    save_png,
    sizes_plot,
    to_data_uri,
)
from unfreeze.training.lr_curve import Picks, make_curve

NAN = float("nan")
CURVE = make_curve(np.geomspace(1e-5, 1, 40), np.linspace(2, 1, 40), np.full(40, 2.0))
HISTORY = pd.DataFrame(
    {
        "epoch": [0, 1, 2],
        "cycle": [0, 1, 1],
        "train_loss": [0.9, 0.7, 0.5],
        "valid_loss": [0.8, 0.6, 0.65],
        "valid_accuracy": [0.7, 0.8, 0.82],
    }
)


def panels(figure: Figure) -> list[Any]:
    """Axes of a figure, typed as Any, so that the tests can use the contents that they expect."""
    return list(figure.axes)


def ticks(figure: Figure, axis: str) -> list[str]:
    return [label.get_text() for label in getattr(panels(figure)[0], f"get_{axis}ticklabels")()]


def test_lr_find_marks_every_point() -> None:
    points = {field.name: 1e-3 * (2 + i) for i, field in enumerate(dataclasses.fields(Picks))}
    axes = panels(lr_find_plot(CURVE, {"rate": 1e-3, **points}))[0]
    at = {line.get_label(): line.get_xdata()[0] for line in axes.lines}
    assert axes.get_xscale() == "log"
    for name, rate in points.items():
        assert at[f"{name} {rate:.1e}"] == rate
    assert at["picked 1.0e-03"] == 1e-3


def test_rates_are_drawn_over_the_iterations() -> None:
    rates = np.array([1e-3, 5e-4, 1e-3])
    figure = rates_plot(pd.DataFrame({"iteration": [0, 1, 2], "rate": rates, "loss": [1.0, 0.8, 0.9]}))
    assert (panels(figure)[0].lines[0].get_ydata() == rates).all()
    assert (panels(figure)[1].lines[0].get_ydata() == [1.0, 0.8, 0.9]).all()


def test_learning_curves_mark_the_ends_of_cycles() -> None:
    axes = panels(learning_curves_plot(HISTORY, 1))
    upright = [line.get_xdata()[0] for line in axes[0].lines if len(set(line.get_xdata())) == 1]
    assert upright == [1, 3]
    assert any(
        (line.get_ydata() == HISTORY["valid_accuracy"]).all() for line in axes[1].lines if len(line.get_ydata()) == 3
    )


def test_learning_curves_without_a_validation_split() -> None:
    figure = learning_curves_plot(HISTORY.assign(valid_loss=NAN, valid_accuracy=NAN), 1)
    assert "no validation split" in [text.get_text() for text in panels(figure)[1].texts]


def test_confusion_shows_counts_and_shares_of_rows() -> None:
    figure = confusion_plot(np.array([[8, 2], [0, 5]]), ["no", "yes"])
    assert [text.get_text() for text in panels(figure)[0].texts] == ["8\n80%", "2\n20%", "0", "5\n100%"]
    assert np.allclose(panels(figure)[0].images[0].get_array(), [[0.8, 0.2], [0.0, 1.0]])


def test_a_class_without_images_is_an_empty_row() -> None:
    figure = confusion_plot(np.array([[0, 0], [1, 3]]), ["none", "some"])
    assert panels(figure)[0].images[0].get_array()[0].tolist() == [0, 0]


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_confusion_draws_any_number_of_classes(classes: int) -> None:
    names = [f"${i}^2$ <b>" for i in range(classes)]
    figure = confusion_plot(np.eye(classes, dtype=np.int64), names)
    assert ticks(figure, "x")[0] == ticks(figure, "y")[0] == names[0]
    assert to_data_uri(figure).startswith("data:image/png;base64,")


def test_balance_adds_up() -> None:
    table = pd.DataFrame({"label": ["a", "a", "b", "a"], "split": ["train", "test", "train", "train"]})
    axes = panels(balance_plot(table))[0]
    ends = {bar.get_y() + bar.get_height() / 2: bar.get_x() + bar.get_width() for bar in axes.patches}
    assert [ends[i] for i in sorted(ends)] == pytest.approx([1, 3])
    assert ticks(axes.figure, "y") == ["b", "a"]


def test_sizes_and_histories_hold_their_points() -> None:
    figure = sizes_plot(pd.Series([10, 10, 40]), pd.Series([20, 20, 30]), 16)
    assert sorted(map(tuple, panels(figure)[0].collections[0].get_offsets())) == [(10, 20), (40, 30)]
    lines = panels(histories_plot({"one": HISTORY, "two": HISTORY}))[0].lines
    assert [list(line.get_xdata()) for line in lines] == [[1, 2, 3], [4, 5, 6]]


def test_the_same_figure_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_png(learning_curves_plot(HISTORY, 0), tmp_path / name)
    one, two = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert one == two
    assert Image.open(io.BytesIO(one)).format == "PNG"


@pytest.mark.parametrize("absent", [None, NAN])
def test_points_that_were_not_found_are_left_out(absent: float | None) -> None:
    picks = {"rate": 1e-3, "minimum": 1e-2, "steepest": absent, "valley": absent}
    labels = [line.get_label() for line in panels(lr_find_plot(CURVE, picks))[0].lines]
    assert "minimum 1.0e-02" in labels
    assert not any(str(label).startswith(("steepest", "valley")) for label in labels)


@pytest.mark.filterwarnings("error")
def test_a_flat_curve_and_any_script_draw_without_warnings() -> None:
    to_data_uri(
        lr_find_plot(CURVE.assign(change=0.0, smoothed=0.0, error=0.0), dict.fromkeys(("rate", "minimum"), 1e-3))
    )
    table = reliability(np.eye(2), np.array([0, 1]))
    to_data_uri(reliability_plot(table, table))
    to_data_uri(confusion_plot(np.eye(3, dtype=np.int64), ["日本語", "हिन्दी", "🦄🫠"]))


def test_of_many_classes_as_many_are_named_as_fit() -> None:
    assert ticks(confusion_plot(np.eye(50, dtype=np.int64), [f"c{i}" for i in range(50)]), "y")[1] == "c1"
    assert ticks(confusion_plot(np.eye(100, dtype=np.int64), [f"c{i}" for i in range(100)]), "y")[1] == "c2"


def test_balance_of_many_classes_shows_both_ends() -> None:
    names = [f"c{i:02d}" for i in range(50) for _ in range(i + 1)]
    figure = balance_plot(pd.DataFrame({"label": names, "split": "train"}))
    assert ticks(figure, "y") == [f"c{i:02d}" for i in (*range(15), *range(35, 50))]
    assert "20 classes\nbetween" in [text.get_text() for text in panels(figure)[0].texts]
