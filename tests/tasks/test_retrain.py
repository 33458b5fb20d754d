"""The step `retrain` where logistic regression was chosen."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
from unfreeze.persistence.interruption import Interruption
from unfreeze.settings.overrides import apply_overrides
from unfreeze.settings.schema import CheckpointSettings, load_settings

ROOT = Path(__file__).parent.parent.parent


def execution(stage: str) -> Run:
    artifact(stage, "").mkdir(parents=True, exist_ok=True)
    tracker: Any = None
    return Run(stage, tracker, "word", CheckpointSettings(60, None), Interruption())


def test_it_is_fitted_anew_on_train_and_valid_and_predicts_with_the_temperature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    apply_overrides("params.yaml", [f"{k}={v}" for k, v in (SMALL | {"data.source": "photos"}).items()])
    paint(Path("photos"), 0)
    s = load_settings()
    table = read_source("photos")
    pack(table, artifact("ingest", ""), s.data, 0)
    precompute.precompute.function(execution("precompute"), 0, s.batch_size, s.backbone)
    for stage, metrics in (("lr_find", {"rate": 1e-3}), ("evaluate", {"temperature": 2.0})):
        artifact(stage, "").mkdir(parents=True, exist_ok=True)
        write_json(artifact(stage, "metrics.json"), metrics)
    write_json(artifact("evaluate", "chosen.json"), {"chosen": "baseline"})
    found = retrain.retrain.function(
        execution("retrain"), 0, s.batch_size, s.head, s.augment, s.train, s.train_head, s.train_augmented, s.unfreeze,
        s.train_full, s.evaluate,
    )  # fmt: skip

    packed = open_packed(artifact("ingest", ""))
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
