"""A pass as recorded in MLflow: the data to reproduce and compare its model, and its progress so far."""

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.tracking.local_store import files_of
from pipeline.tracking.sender import PASS_TAG, STAGE_TAG, address, client, reaching
from unfreeze.errors import UserError

FILES = ("params.yaml", "dvc.lock")


@dataclass(frozen=True)
class Recorded:
    """A pass, read from its parent run in MLflow.

    Attributes:
        run: the parent run's id.
        commit: the git commit.
        changed: whether the code that was run differs from the commit.
        files: text of `params.yaml` and `dvc.lock`.
        metrics: ``<step>/<metric>`` -> value.
        version: the registered model version as ``models:/<name>/<number>``, if there is one.
        sha256: SHA-256 of the registered model's weights.
    """

    run: str
    commit: str
    changed: bool
    files: dict[str, str]
    metrics: dict[str, float]
    version: str | None = None
    sha256: str | None = None


def find_recorded(named: str) -> Recorded:
    """Find a pass by an id of its parent run or of one of its steps' runs, or by ``models:/<name>/<version or alias>``.

    Raises:
        UserError: MLflow does not know it, or lacks its commit or files.
        Unreachable: MLflow does not answer.
    """
    from mlflow.exceptions import MlflowException

    mlflow = client()
    with reaching():
        try:
            version = _version(mlflow, named) if named.startswith("models:/") else None
            run = mlflow.get_run(version.run_id if version else named)
            if parent := run.data.tags.get("mlflow.parentRunId"):
                run = mlflow.get_run(parent)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST" and error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            raise UserError(
                f"MLflow at {address()} does not know {named}: give a run's id, or models:/<name>/<version>."
            ) from None
        run_id, tags = run.info.run_id, run.data.tags
        present = {file.path for file in mlflow.list_artifacts(run_id)}
        if missing := [name for name in FILES if name not in present]:
            raise UserError(f"MLflow's run {run_id} has no {' and no '.join(missing)}: it is not a finished pass.")
        if "mlflow.source.git.commit" not in tags:
            raise UserError(f"MLflow's run {run_id} does not say which git commit was run.")
        versions = [version] if version else mlflow.search_model_versions(f"run_id = '{run_id}'", max_results=1)
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(mlflow.download_artifacts(run_id, name, folder)).read_text("utf-8") for name in FILES}
            sha256 = _weights_digest(mlflow, versions[0], folder) if versions else None
    return Recorded(
        run_id,
        tags["mlflow.source.git.commit"],
        tags.get("unfreeze.changed") == "yes",
        files,
        dict(run.data.metrics),
        f"models:/{versions[0].name}/{versions[0].version}" if versions else None,
        sha256,
    )


def _version(mlflow: Any, named: str) -> Any:
    name, _, wanted = named.removeprefix("models:/").partition("/")
    name, at, alias = name.partition("@")
    return mlflow.get_model_version_by_alias(name, alias) if at else mlflow.get_model_version(name, wanted)


def _weights_digest(mlflow: Any, version: Any, folder: str) -> str | None:
    """SHA-256 of the weights in a registered model; None unless it has exactly one `.safetensors` file."""
    from mlflow.artifacts import download_artifacts

    model = download_artifacts(f"models:/{version.name}/{version.version}", dst_path=folder)
    found = list(Path(model).rglob("*.safetensors"))
    return hashlib.sha256(found[0].read_bytes()).hexdigest() if len(found) == 1 else None


def prepare_experiment() -> None:
    """Create the experiment that `MLFLOW_EXPERIMENT_NAME` names, if it is missing.

    Without an MLflow server, its artifacts are stored in the local folder that `files_of` returns.
    """
    mlflow, name = client(), os.environ["MLFLOW_EXPERIMENT_NAME"]
    with reaching():
        if mlflow.get_experiment_by_name(name) is None:
            mlflow.create_experiment(name, files_of(name))


@dataclass(frozen=True)
class Course:
    """Progress of a pass: final metrics of finished steps, and `train_full`'s calibrated validation loss by epoch."""

    valid_losses: list[float]
    metrics: dict[str, float]


def course_of(key: str) -> Course:
    """Progress in MLflow of the pass with this key. Raises Unreachable if MLflow does not answer."""
    mlflow = client()
    with reaching():
        experiment = mlflow.get_experiment_by_name(os.environ["MLFLOW_EXPERIMENT_NAME"])
        parents = mlflow.search_runs([experiment.experiment_id], f"tags.`{PASS_TAG}` = '{key}'") if experiment else []
        if not parents:
            return Course([], {})
        parent = parents[0]
        steps = mlflow.search_runs(
            [experiment.experiment_id],
            f"tags.`mlflow.parentRunId` = '{parent.info.run_id}' and tags.`{STAGE_TAG}` = 'train_full'",
            order_by=["attributes.start_time DESC"],
        )
        points = mlflow.get_metric_history(steps[0].info.run_id, "valid_calibrated_loss") if steps else []
    by_epoch = {point.step: point.value for point in points}
    return Course([by_epoch[epoch] for epoch in sorted(by_epoch)], dict(parent.data.metrics))
