"""MLflow's registry: log the retrained model to the pass's parent run, and register it under its name."""

import contextlib
import importlib.metadata
import io
import logging
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

from pipeline.tracking.local_store import tracking_uri

REQUIREMENTS = (
    "torch", "torchvision", "timm", "safetensors", "numpy", "opencv-python-headless", "pillow", "pandas", "ruamel.yaml", "tqdm",
)  # fmt: skip
"""Packages to install with a served model."""

EXTRAS = ("pillow-heif",)
"""Packages that are added if they are installed: the training images may have been read with them."""

KEY_TAG = "unfreeze.key"
"""Tag of a model and its version: hash of what the step depends on, such as weights, serving code and model name."""


def register_model(weights: Path, name: str, parent: str, key: str) -> Any:
    """Log the model to the parent run as an MLflow pyfunc and register it; returns the version.

    If a version with this key exists, it is returned: an earlier pass may have been killed right after registering it.
    """
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    import mlflow

    named = os.environ["MLFLOW_TRACKING_URI"]
    mlflow.set_tracking_uri(tracking_uri())
    os.environ["MLFLOW_TRACKING_URI"] = named  # MLflow has just changed it, and journals are matched by it
    client = mlflow.MlflowClient()
    if versions := client.search_model_versions(f"tags.`{KEY_TAG}` = '{key}'"):
        return versions[0]
    # MLflow prints progress on stderr; errors are raised.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        model = _logged(client, parent, key) or _log(client, weights, parent, key)
        return mlflow.register_model(f"models:/{model}", name, tags={KEY_TAG: key})


def _log(client: Any, weights: Path, parent: str, key: str) -> str:
    """Log the model to the parent run, with the metrics of the step retrain; returns the model's id.

    Replaces `mlflow.pyfunc.log_model`, which requests the history of each of the run's metrics. With a server behind
    a password, where a request takes a second, this took two minutes.
    """
    import mlflow
    from mlflow.entities import LoggedModelOutput, Metric
    from mlflow.models import Model

    run, root = client.get_run(parent), Path(__file__).parent.parent.parent
    model = client.create_logged_model(
        run.info.experiment_id, "model", source_run_id=parent, params=run.data.params, tags={KEY_TAG: key}
    )
    client.log_outputs(parent, [LoggedModelOutput(model.model_id, step=0)])
    own = [name for name in run.data.metrics if name.startswith("retrain/")]
    points = [p for name in own for p in client.get_metric_history(parent, name) if p.model_id is None]
    client.log_batch(
        parent, [Metric(p.key, p.value, p.timestamp, p.step, model.model_id, run_id=parent) for p in points]
    )
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "model"))
        mlflow.pyfunc.save_model(
            path,
            python_model=str(Path(__file__).with_name("served_model.py")),
            # A copy, as MLflow refuses links, which DVC may create to its cache (cache.type).
            artifacts={"weights": shutil.copy(weights, folder)},
            code_paths=[str(root / "unfreeze")],
            pip_requirements=[f"{package}=={_version(package)}" for package in (*REQUIREMENTS, *_extras())],
            mlflow_model=Model(model.artifact_location, parent, model_uuid=model.model_id, model_id=model.model_id),
        )
        client.log_model_artifacts(model.model_id, path)
    client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)


def _extras() -> list[str]:
    installed = {found.name.lower().replace("_", "-") for found in importlib.metadata.distributions()}
    return [package for package in EXTRAS if package in installed]


def _version(package: str) -> str:
    """The installed version as in package indexes, without the suffix of a device-specific build (``+cu126``)."""
    return importlib.metadata.version(package).partition("+")[0]


def _logged(client: Any, parent: str, key: str) -> str | None:
    """Id of the model with this key that an earlier attempt logged completely; incomplete ones are removed."""
    experiment = client.get_run(parent).info.experiment_id
    whole = None
    for model in client.search_logged_models([experiment], filter_string=f"source_run_id = '{parent}'"):
        if model.status != "READY":
            client.delete_logged_model(model.model_id)
        elif model.tags.get(KEY_TAG) == key:
            whole = str(model.model_id)
    return whole
