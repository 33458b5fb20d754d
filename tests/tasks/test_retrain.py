"""The step `retrain` if logistic regression, or an average of cycles, was chosen."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flows.summary import RESULTS
from pipeline.artifacts import artifact, write_json
from pipeline.step import Run
from tasks import precompute, retrain
from tests.integration.project import SMALL, paint
from unfreeze.data.packed import open_packed
from unfreeze.data.packing import pack
from unfreeze.data.sources import read_source
from unfreeze.evaluation.baseline import baseline_probabilities, fit_baseline
from unfreeze.evaluation.predicting import with_temperature
from unfreeze.evaluation.predictor import Predictor
from unfreeze.models.weights import load_classifier
from unfreeze.persistence.interruption import Interruption
from unfreeze.settings.overrides import apply_overrides
from unfreeze.settings.schema import CheckpointSettings, load_settings

ROOT = Path(__file__).parent.parent.parent


def execution(stage: str) -> Run:
    artifact(stage, "").mkdir(parents=True, exist_ok=True)
    tracker: Any = SimpleNamespace(curve=lambda values, at: None)
    return Run(stage, tracker, "word", CheckpointSettings(60, None, "none"), Interruption())


def retrained(chosen: dict[str, Any], *changes: str) -> dict[str, float]:
    """Metrics of `retrain` on generated images, in the working folder, after a pass that made this choice."""
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    settings = SMALL | {"data.source": "photos"}
    apply_overrides("params.yaml", [*(f"{key}={value}" for key, value in settings.items()), *changes])
    paint(Path("photos"), 0)
    s = load_settings()
    pack(read_source("photos"), artifact("ingest", ""), s.data, 0)
    precompute.precompute.function(execution("precompute"), 0, s.batch_size, s.backbone)
    rate = {"rate": 1e-3}
    for stage, metrics in (("lr_find", rate), ("unfreeze_lr_find", rate), ("evaluate", {"temperature": 2.0})):
        artifact(stage, "").mkdir(parents=True, exist_ok=True)
        write_json(artifact(stage, "metrics.json"), metrics)
    write_json(artifact("evaluate", "chosen.json"), chosen)
    return dict(
        retrain.retrain.function(
            execution("retrain"), 0, s.batch_size, s.head, s.augment, s.train, s.train_head, s.train_augmented,
            s.unfreeze, s.train_full, s.evaluate,
        )
    )  # fmt: skip


def test_an_average_is_of_the_same_cycles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = retrained({"chosen": "soup", "soup": [1, 3]}, "train_full.cycles=4")
    assert found["epochs"] == 3
    folder = execution("retrain").scratch / "cycles"
    assert sorted(path.name for path in folder.iterdir()) == ["1.safetensors", "2.safetensors", "3.safetensors"]
    one, other = (load_classifier(folder / f"{number}.safetensors")[0].state_dict() for number in (1, 3))
    model, _ = load_classifier(artifact("retrain", "model.safetensors"))
    assert model.temperature == 2
    weight = "head.2.weight"
    assert not torch.equal(one[weight], other[weight])
    assert torch.equal(model.state_dict()[weight], (one[weight] + other[weight]) / 2)


def test_it_is_fitted_anew_on_train_and_valid_and_predicts_with_the_temperature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = retrained({"chosen": "baseline"})

    packed, table = open_packed(artifact("ingest", "")), read_source("photos")
    activations, test = np.load(artifact("precompute", "activations.npy")), packed.rows("test")
    rows = np.sort(np.concatenate([packed.rows("train"), packed.rows("valid")]))
    regression = fit_baseline(activations[rows], packed.labels[rows])
    expected = with_temperature(baseline_probabilities(regression, activations[test], len(packed.classes)), 2.0)
    files = dict(zip(table["path"], table["file"], strict=True))
    predicted = Predictor(artifact("retrain", "model.safetensors")).predict(
        [files[path] for path in packed.table["path"].iloc[test]]
    )
    assert predicted.filter(like="p_").to_numpy() == pytest.approx(expected, abs=1e-3)
    assert found["test_accuracy"] == found["test_baseline_accuracy"]
    assert RESULTS["retrain"].format(**found) == "0 epochs on train + valid"
    assert json.loads(json.dumps(found)) == found
    assert artifact("retrain", "history.csv").read_text().startswith("epoch,cycle")
    assert artifact("retrain", "batches.csv").read_text().startswith("iteration,rate,loss")
