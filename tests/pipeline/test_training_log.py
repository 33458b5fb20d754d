"""The curves of a training in MLflow."""

from pathlib import Path

import pytest

from pipeline.step import Run
from pipeline.tracking import sender
from pipeline.tracking.tracker import Tracker
from pipeline.training_log import POINTS, callbacks
from unfreeze.persistence.interruption import Interruption
from unfreeze.settings.schema import CheckpointSettings

EPOCHS = 4


@pytest.mark.parametrize(("batches", "every"), [(250, 1), (251, 2)])
def test_mlflow_gets_at_most_a_thousand_points_of_a_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int, every: int
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for name, value in {"UNFREEZE_PASS": "a", "UNFREEZE_OWNER": "1@here", "MLFLOW_EXPERIMENT_NAME": "unfreeze"}.items():
        monkeypatch.setenv(name, value)
    settings = {"data.source": "photos", "backbone.name": "timm:a", "data.image_size": 32}
    tracker = Tracker("train_full", settings, {})
    run = Run("train_full", tracker, "key", CheckpointSettings(60, None, "none"), Interruption())
    report = callbacks(run, EPOCHS, batches).batches
    rows = [{"iteration": float(i), "rate": 1e-3, "loss": 1.0} for i in range(EPOCHS * batches)]
    for start in range(0, len(rows), 10):
        report(rows[start : start + 10])
    tracker.close("FINISHED", {}, 0.0)
    client = sender.client()
    (child,) = client.search_runs(
        [client.get_experiment_by_name("unfreeze").experiment_id], "tags.`mlflow.parentRunId` LIKE '%'"
    )
    steps = [point.step for point in client.get_metric_history(child.info.run_id, "loss")]
    assert sorted(steps) == list(range(0, EPOCHS * batches, every)) and len(steps) <= POINTS
