"""Hand the retrained model to MLflow: a model that can be served, registered under a name, with a version.

The version belongs to the pass's parent run, which carries the metrics, the reports, `params.yaml` and `dvc.lock` that
it takes to build the same model again. Where a pass was killed right after it had registered its model, the version is the
next pass's as well, whose parent names it (``register/version``).

A version's number is the server's to give, so this is the one step that needs it. While it is away the step fails with a
sentence and nothing is lost: tried again, it takes up what the first attempt has left there.
"""

import contextlib
import hashlib
import importlib.metadata
import io
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tasks.files import artifact, write_json
from tasks.publishing import reaching
from tasks.step import Run, step
from unfreeze.plotting import confusion_plot, save_png
from unfreeze.settings import Register

REQUIREMENTS = (
    "torch", "torchvision", "timm", "safetensors", "numpy", "opencv-python-headless", "pillow", "pandas", "pyyaml", "tqdm",
)  # fmt: skip
"""Packages that a served model is installed with."""

KEY_TAG = "unfreeze.key"
"""Tag of a model and its version that says what they were made of: weights, the code that serves them, and the name."""


@step
def register(run: Run, register: Register) -> dict[str, float]:
    weights = artifact("retrain", "model.safetensors")
    save_png(confusion_plot(*_confusion(artifact("retrain", "confusion_matrix.csv"))), run.path("confusion_matrix.png"))
    parent = run.tracker.parent()
    with reaching():
        found = _register(weights, register.model_name, parent, run.key)
    version = int(found.version)
    run.log("%s version %d registered in MLflow, run %s", register.model_name, version, found.run_id)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    write_json(
        run.path("registration.json"),
        {"model": register.model_name, "version": version, "run": found.run_id, "sha256": digest},
    )
    return {"version": version}


def _confusion(path: Path) -> tuple[NDArray[np.int64], list[str]]:
    """The confusion matrix (C, C) and the names of the classes, as they were written: pandas would rename a class `true`,
    as the corner of the table is called."""
    table = pd.read_csv(path, header=None, dtype=str, keep_default_na=False)
    return table.iloc[1:, 1:].to_numpy().astype(np.int64), list(table.iloc[0, 1:])


def _register(weights: Path, name: str, parent: str, key: str) -> Any:
    """Log the model to the parent run as an MLflow pyfunc and register it, if that is not done, perhaps by an earlier pass
    that was killed before DVC had noted it; returns the version."""
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    import mlflow

    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    client = mlflow.MlflowClient()
    if versions := client.search_model_versions(f"tags.`{KEY_TAG}` = '{key}'"):
        return versions[0]
    root = Path(__file__).parent.parent
    # MLflow says on stderr what it did; what goes wrong it raises.
    with mlflow.start_run(run_id=parent), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        model = _logged(client, parent, key)
        if model is None:
            model = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(root / "tasks" / "serving.py"),
                artifacts={"weights": str(weights)},
                code_paths=[str(root / "unfreeze")],
                pip_requirements=[f"{package}=={_version(package)}" for package in REQUIREMENTS],
                tags={KEY_TAG: key},
            ).model_id
        return mlflow.register_model(f"models:/{model}", name, tags={KEY_TAG: key})


def _version(package: str) -> str:
    """The version that is installed, as package indexes know it: without what a build for one device adds (``+cu126``)."""
    return importlib.metadata.version(package).partition("+")[0]


def _logged(client: Any, parent: str, key: str) -> str | None:
    """The id of the model with this key that an earlier attempt has logged whole; what was logged in part is removed."""
    experiment = client.get_run(parent).info.experiment_id
    whole = None
    for model in client.search_logged_models([experiment], filter_string=f"source_run_id = '{parent}'"):
        if model.status != "READY":
            client.delete_logged_model(model.model_id)
        elif model.tags.get(KEY_TAG) == key:
            whole = str(model.model_id)
    return whole
