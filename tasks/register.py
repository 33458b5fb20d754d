"""Register the retrained model in MLflow, as a version of a model that can be served.

The version belongs to the pass's parent run, which has the metrics, the reports, `params.yaml` and `dvc.lock`, with
which the same model can be built again. If a pass is killed right after it has registered its model, the next pass
uses that version, and its parent run names it (``register/version``).

The server assigns a version's number, so this is the only step that needs the server. Without it the step fails with an
error message. A retry continues with what the first attempt has created on the server.
"""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pipeline.artifacts import artifact, write_json
from pipeline.step import Run, step
from pipeline.tracking.registry import register_model
from pipeline.tracking.sender import reaching
from unfreeze.reports.plots import confusion_plot, save_png
from unfreeze.settings.schema import Register


@step
def register(run: Run, register: Register) -> dict[str, float]:
    weights = artifact("retrain", "model.safetensors")
    save_png(confusion_plot(*_confusion(artifact("retrain", "confusion_matrix.csv"))), run.path("confusion_matrix.png"))
    parent = run.tracker.parent()
    with reaching():
        found = register_model(weights, register.model_name, parent, run.key)
    version = int(found.version)
    run.log("%s version %d registered in MLflow, run %s", register.model_name, version, found.run_id)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    write_json(
        run.path("registration.json"),
        {"model": register.model_name, "version": version, "run": found.run_id, "sha256": digest},
    )
    return {"version": version}


def _confusion(path: Path) -> tuple[NDArray[np.int64], list[str]]:
    """The confusion matrix (C, C) and the names of the classes.

    The header is read as a row of data: pandas would otherwise rename a class called `true`, because the corner cell
    also contains `true`, and column names must be unique.
    """
    table = pd.read_csv(path, header=None, dtype=str, keep_default_na=False)
    return table.iloc[1:, 1:].to_numpy().astype(np.int64), list(table.iloc[0, 1:])
