"""An experiment that is created in MLflow before a run, with a real local database."""

from pathlib import Path

import pytest

from pipeline.tracking.local_store import files_of
from pipeline.tracking.recorded import prepare_experiment
from pipeline.tracking.sender import client


def test_a_prepared_experiment_keeps_its_files_where_a_steps_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = tmp_path / "a%20b"  # MLflow would decode a path, so the location must be a URI
    workspace.mkdir()
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "cells")
    prepare_experiment()
    prepare_experiment()  # it is there already
    assert client().get_experiment_by_name("cells").artifact_location == files_of("cells")
