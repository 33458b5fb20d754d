"""The report pages: complete, self-contained, and escaped."""

import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.results import keep_confusion
from pipeline.step import Run
from tasks.register import _confusion
from unfreeze.data.packed import PackedImages, in_memory
from unfreeze.evaluation.evaluating import Predictions
from unfreeze.evaluation.metrics import measure
from unfreeze.evaluation.model_choice import Candidate
from unfreeze.reports.evaluate import NAMES, Course, evaluate_report
from unfreeze.reports.explore import explore_metrics, explore_report
from unfreeze.training.lr_curve import make_curve

NASTY = ["<script>alert(1)</script>", "\"quoted\" & 'sharp' $x^2$", "🐱 cats", "a very long name " * 8]
SIDE = 24


def packed_images(count: int, classes: list[str], splits: tuple[str, ...] = ("train", "valid", "test")) -> PackedImages:
    rng = np.random.default_rng(0)
    labels = np.arange(count) % len(classes)
    frame = pd.DataFrame(
        {
            "path": [f'<i>{i}</i>/"><img src=x onerror=alert({i})>.jpg' for i in range(count)],
            "label": [classes[i] for i in labels],
            "split": [splits[(i // len(classes)) % len(splits)] for i in range(count)],
            "width": SIDE,
            "height": SIDE,
            "reason": "",
            "remark": "",
        }
    )
    pixels = rng.integers(0, 256, count * SIDE * SIDE * 3).astype(np.uint8)
    sizes = np.full((count, 2), SIDE)
    return PackedImages(
        in_memory(pixels),
        frame,
        classes,
        labels,
        sizes,
        np.arange(count) * SIDE * SIDE * 3,
        SIDE,
    )


def duplicate_pairs(*rows: tuple[int, int, str, bool, bool]) -> pd.DataFrame:
    frame = pd.DataFrame(list(rows), columns=["row_a", "row_b", "kind", "leak", "conflict"])
    return frame.astype({"leak": bool, "conflict": bool})


class Reader(HTMLParser):
    """Collects tags, links and texts; fails if a tag is left open."""

    void = {"meta", "img", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check(text: str) -> Reader:
    """Check that a page is complete and self-contained."""
    reader = Reader(text)
    assert not reader.tags & {"script", "link", "iframe", "i", "object", "base"}
    assert all(link.startswith(("data:image/", "#")) for link in reader.links)
    assert not re.search(r"https?:|url\(|@import", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    assert len(text) < 3_000_000
    return reader


def course() -> Course:
    curve = make_curve(np.array([1e-4, 1e-3, 1e-2]), np.array([1.0, 0.5, 2.0]), np.ones(3))
    picks = {"rate": 1e-4, "minimum": 1e-3, "midpoint": 5e-4, "divergence": 2e-3, "steepest": 5e-4, "valley": 5e-4}
    history = pd.DataFrame(
        {
            "epoch": [0, 1],
            "cycle": [0, 1],
            "train_loss": [0.9, 0.7],
            "valid_loss": [0.8, 0.6],
            "valid_accuracy": [0.7, 0.8],
        }
    )
    batches = pd.DataFrame({"iteration": range(4), "rate": 1e-3, "loss": [1.0, 0.9, 0.8, 0.7]})
    names = ("train_head", "train_augmented", "train_full")
    return Course(
        {"lr_find": (curve, picks), "unfreeze_lr_find": (curve, picks)}, dict.fromkeys(names, history), batches
    )


def evaluation(packed: PackedImages, splits: tuple[str, ...], sure: float = 2.0) -> tuple[str, Mapping[str, float]]:
    rng = np.random.default_rng(1)
    predictions: dict[str, Predictions] = {}
    metrics: dict[str, float] = {}

    def guess(labels: np.ndarray) -> np.ndarray:
        logits = rng.normal(size=(len(labels), len(packed.classes))) + sure * np.eye(len(packed.classes))[labels]
        return (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)

    for split in splits:
        rows = packed.rows(split)
        labels = packed.labels[rows]
        plain, tta, baseline, before = guess(labels), guess(labels), guess(labels), guess(labels)
        predictions[split] = Predictions(rows, plain, tta, before)
        for kind, probabilities in (("", plain), ("tta_", tta), ("baseline_", baseline), ("uncalibrated_", before)):
            scores = measure(labels, probabilities)
            metrics |= {f"{split}_{kind}{name}": value for name, value in scores.items()}
    metrics["temperature"] = 1.37
    labels = packed.labels[packed.rows("valid")]
    candidates = [Candidate(name, guess(labels), labels) for name in NAMES]
    reason = "train_full is handed on: <b>why</b>"
    return evaluate_report(packed, predictions, metrics, candidates, "train_full", reason, course(), 0), metrics


@pytest.mark.parametrize("count", [2, 10, 100])
def test_evaluation_of_many_classes(count: int) -> None:
    names = sorted((NASTY + [f"class {i}" for i in range(count)])[:count])
    packed = packed_images(max(60, 3 * count), names)
    text, metrics = evaluation(packed, ("valid", "test"))
    reader = check(text)
    assert all(name in reader.text for name in names)
    assert f"{metrics['test_tta_accuracy']:.1%}" in reader.text
    assert f"{metrics['test_baseline_accuracy']:.1%}" in reader.text
    assert f"{metrics['test_tta_log_loss']:.4f}" in reader.text
    assert "<b>why</b>" in reader.text
    assert "the temperature 1.37" in reader.text
    assert (
        f"is {metrics['test_ece']:.3f}; before calibration it was {metrics['test_uncalibrated_ece']:.3f}" in reader.text
    )
    assert f"would have {metrics['test_ece_by_chance']:.3f} by chance" in reader.text
    assert all(word in reader.text for word in ("Most wrong", "Most uncertain", "Learning-rate finder: head"))


def test_evaluation_without_a_test_split() -> None:
    packed = packed_images(40, ["a", "b"], ("train", "valid"))
    reader = check(evaluation(packed, ("valid",))[0])
    assert "judged on the valid images" in reader.text
    assert "test, with TTA" not in reader.text


def test_evaluation_with_nothing_wrong_says_so() -> None:
    reader = check(evaluation(packed_images(40, ["a", "b"]), ("valid", "test"), sure=50)[0])
    assert reader.text.count("There are none.") == 2


@pytest.mark.parametrize("count", [2, 40])
def test_exploration_shows_what_is_wrong(count: int) -> None:
    names = sorted((NASTY + [f"class {i}" for i in range(count)])[:count])
    packed = packed_images(2 * count * 3, names)
    broken = packed.table.head(2).assign(path="<u>bad</u>.jpg", reason="ends <early>", split="")
    found = pd.concat([packed.table, broken])
    pairs = duplicate_pairs((0, count, "exact", True, False), (1, 2, "near", False, True))
    assert explore_metrics(packed, found, pairs) == {
        "images": len(packed),
        "classes": count,
        "broken": 2,
        "exact_duplicates": 1,
        "near_duplicates": 1,
        "leaks": 1,
        "conflicts": 1,
        "largest_to_smallest_class": 1.0,
    }
    reader = check(explore_report(packed, found, pairs, "<em>source</em>", ["These may mean one class: '<b>', 'B'."]))
    assert "These may mean one class: '<b>', 'B'." in reader.text
    for expected in (
        "<em>source</em>",
        "<u>bad</u>.jpg",
        "ends <early>",
        "lie in different splits",
        "different labels",
    ):
        assert expected in reader.text
    assert all(name in reader.text for name in names)


def test_exploration_of_clean_images_has_nothing_to_say() -> None:
    packed = packed_images(200, ["a", "b"])
    reader = check(explore_report(packed, packed.table, duplicate_pairs(), "folder"))
    for expected in ("Nothing here asks for attention", "No duplicates", "Every file could be read"):
        assert expected in reader.text


def test_exploration_without_a_test_split_warns() -> None:
    packed = packed_images(200, ["a", "b"], ("train", "valid"))
    assert "There is no test split" in check(explore_report(packed, packed.table, duplicate_pairs(), "folder")).text


def test_long_tables_are_folded() -> None:
    packed = packed_images(120, [f"class {i:02d}" for i in range(40)])
    for text in (evaluation(packed, ("valid", "test"))[0], explore_report(packed, packed.table, duplicate_pairs(), "")):
        assert "All 40 classes" in check(text).text
        assert text.count("<details>") == 1


def test_the_headline_compares_with_the_baseline() -> None:
    text, metrics = evaluation(packed_images(60, ["a", "b"], ("train", "valid")), ("valid",))
    lead = 100 * (metrics["valid_tta_accuracy"] - metrics["valid_baseline_accuracy"])
    assert f"{abs(lead):.1f} percentage points {'above' if lead >= 0 else 'below'}" in text
    assert "the model was chosen on these very images" in text


def test_a_class_may_be_called_as_the_corner_of_the_confusion_matrix_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "path", lambda run, name: tmp_path / name)
    packed = packed_images(12, ["false", "true", "nan"])
    rows = packed.rows("test")
    probabilities = np.eye(3, dtype=np.float32)[packed.labels[rows]]
    keep_confusion(Run.__new__(Run), packed, {"test": Predictions(rows, probabilities, probabilities, probabilities)})
    matrix, classes = _confusion(tmp_path / "confusion_matrix.csv")
    assert classes == ["false", "true", "nan"]
    assert matrix.tolist() == np.diag(np.bincount(packed.labels[rows], minlength=3)).tolist()
