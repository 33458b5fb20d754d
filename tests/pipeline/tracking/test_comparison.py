"""Comparison of a registered version with the previous version, in a real MLflow."""

from pathlib import Path

import pytest

from pipeline.tracking import sender
from pipeline.tracking.comparison import compare_with_the_one_before


def test_a_version_is_compared_with_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    client = sender.client()
    experiment = client.create_experiment("unfreeze")
    client.create_registered_model("photos")

    def version(data: str, **metrics: float) -> str:
        run = client.create_run(experiment, tags={"unfreeze.data": data}).info.run_id
        for name, value in metrics.items():
            client.log_metric(run, name.replace("__", "/"), value)
        made = client.create_model_version("photos", f"runs:/{run}/model", run)
        return compare_with_the_one_before("photos", int(made.version))

    assert version("a", retrain__test_tta_accuracy=0.9).endswith("no earlier version to compare it with.")
    assert version("a", retrain__test_tta_accuracy=0.95) == (
        "Version 2 of photos is better than version 1: 0.9500 of the test images right, 0.9000 before."
    )
    same = version("a", retrain__test_tta_accuracy=0.95, evaluate__valid_tta_accuracy=0.8)
    assert same.startswith("Version 3 of photos is not better than version 2")
    without_test = version("b", evaluate__valid_tta_accuracy=0.9)
    assert without_test == (
        "Version 4 of photos is better than version 3: 0.9000 of the validation images right, 0.8000 before, on other images."
    )
