"""The registered model contains the weights, for every way in which DVC stores them."""

from pathlib import Path

import mlflow
import pytest

from pipeline.tracking.registry import register_model
from pipeline.tracking.sender import client


def test_weights_that_dvc_has_linked_into_its_cache_are_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example with `dvc config cache.type symlink`, for a cache on another disk."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/3b0c").write_bytes(b"weights")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "cache/3b0c")
    experiment = client().create_experiment("unfreeze", f"file://{tmp_path}/files")
    run = client().create_run(experiment).info.run_id
    version = register_model(tmp_path / "model.safetensors", "unfreeze", run, "key")
    folder = mlflow.artifacts.download_artifacts(version.source, dst_path=str(tmp_path / "down"))
    file = Path(folder, "artifacts/model.safetensors")
    assert file.read_bytes() == b"weights" and not file.is_symlink()
