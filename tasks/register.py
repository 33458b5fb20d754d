"""Hand the retrained model to MLflow: a model that can be served, registered under a name, with a version.

The version belongs to the pass's parent run, which carries the metrics, the reports, `params.yaml` and `dvc.lock` that
it takes to build the same model again. Where a pass was killed right after it had registered its model, the version is the
next pass's as well, whose parent names it (``register/version``).

A version's number is the server's to give, so this is the one step that needs it. While it is away the step fails with a
sentence and nothing is lost: tried again, it takes up what the first attempt has left there.
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
    """The confusion matrix (C, C) and the names of the classes, as they were written: pandas would rename a class `true`,
    as the corner of the table is called."""
    table = pd.read_csv(path, header=None, dtype=str, keep_default_na=False)
    return table.iloc[1:, 1:].to_numpy().astype(np.int64), list(table.iloc[0, 1:])
