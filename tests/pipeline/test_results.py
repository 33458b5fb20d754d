"""Files that the evaluation writes."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.results import write_predictions
from unfreeze.data.packed import PackedImages, in_memory
from unfreeze.evaluation.evaluating import Predictions


def written(path: Path, classes: int, images: int = 30) -> tuple[pd.DataFrame, Predictions, PackedImages]:
    """Write the file for random predictions of this many classes."""
    rng = np.random.default_rng(0)
    names = sorted(f"c{i}" for i in range(classes))
    labels = rng.integers(0, classes, images)
    table = pd.DataFrame({"path": [f"{i}.png" for i in range(images)], "label": [names[label] for label in labels]})
    sizes = np.ones((images, 2), np.int64)
    packed = PackedImages(in_memory(np.zeros(3, np.uint8)), table, names, labels, sizes, labels, 1)
    plain, tta = (rng.dirichlet(np.ones(classes), images).astype(np.float32) for _ in range(2))
    predictions = Predictions(np.arange(images), plain, tta, plain)
    write_predictions(path, packed, {"test": predictions})
    return pd.read_csv(path), predictions, packed


def test_predictions_have_a_column_for_each_class(tmp_path: Path) -> None:
    table, predictions, packed = written(tmp_path / "p.csv", 100)
    assert list(table.columns[:4]) == ["path", "split", "label", "predicted"]
    assert table[[f"p_{name}" for name in packed.classes]].to_numpy() == pytest.approx(predictions.plain, abs=1e-6)
    assert table[[f"tta_p_{name}" for name in packed.classes]].to_numpy() == pytest.approx(predictions.tta, abs=1e-6)


def test_predictions_of_many_classes_are_those_that_count(tmp_path: Path) -> None:
    table, predictions, packed = written(tmp_path / "p.csv", 1000)
    for prefix, expected in (("p_", predictions.plain), ("tta_p_", predictions.tta)):
        found = table[[f"{prefix}{name}" for name in packed.classes]].to_numpy()
        kept = ~np.isnan(found)
        assert found[kept] == pytest.approx(expected[kept], abs=1e-6)
        assert set(kept.sum(1)) <= {20, 21} and kept[np.arange(30), packed.labels].all()
        likeliest = np.sort(expected, 1)[:, -20:]
        assert np.sort(np.where(kept, found, 0), 1)[:, -20:] == pytest.approx(likeliest, abs=1e-6)
    assert [packed.classes[i] for i in predictions.plain.argmax(1)] == table["predicted"].tolist()
    assert (tmp_path / "p.csv").stat().st_size < 30 * 2500 + 20_000  # the header takes 16,000
