"""Finding a rate in a step: the metrics, the files, and the message of a sweep that ends too early."""

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from pipeline.artifacts import artifact
from pipeline.find_rate import find_rate
from pipeline.step import Run
from unfreeze.batches.loader import Batch
from unfreeze.persistence.interruption import Interruption
from unfreeze.settings.schema import CheckpointSettings, LRFind


@pytest.mark.parametrize(
    ("end", "rule", "given", "told"),
    [
        (1e-2, "divergence", None, True),
        (1e3, "divergence", None, False),
        (1e-2, "minimum", None, False),
        (1e-2, "divergence", 1e-4, False),
    ],
)
def test_a_sweep_without_divergence_is_told_if_its_rule_needs_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, end: float, rule: str,
    given: float | None, told: bool,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    artifact("lr_find", "").mkdir(parents=True)
    points: list[dict[str, float]] = []
    tracker: Any = SimpleNamespace(curve=lambda values, at: points.append(values))
    run = Run("lr_find", tracker, "word", CheckpointSettings(60, None, "none"), Interruption())
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    images, labels = torch.randn(64, 4), torch.arange(64) % 2

    def batches(epoch: int, first: int) -> Iterator[Batch]:
        yield from [(images[i : i + 8], labels[i : i + 8]) for i in range(8 * first, 64, 8)]

    optimizer = torch.optim.SGD(model.parameters())
    with caplog.at_level(logging.INFO, "unfreeze"):
        metrics = find_rate(
            run, model, optimizer, batches, LRFind(1e-4, end, 30, rule, given), nn.CrossEntropyLoss(), 2
        )
    assert ("did not diverge up to the last rate; a higher lr_find.end" in caplog.text) == told
    assert metrics["rate"] == (given or metrics[rule] / {"divergence": 100, "minimum": 10}[rule])
    assert len(pd.read_csv(artifact("lr_find", "curve.csv"))) == len(points)
    assert artifact("lr_find", "lr_find.png").stat().st_size > 10_000
