"""Links from Prefect to MLflow: the run, the learning-rate plots, the confusion matrices, as Prefect artifacts."""

import os

from prefect import get_run_logger
from prefect.artifacts import create_link_artifact

from pipeline.artifacts import artifact
from pipeline.process.secrets import mask, without_credentials
from pipeline.tracking.journal import pass_folder, read_json
from pipeline.tracking.tracker import current_pass

LINKED = {
    "lr_find": ("lr_find.png", "LR plot of the head"),
    "unfreeze_lr_find": ("lr_find.png", "LR plot of the whole network"),
    "evaluate": ("confusion_matrix.png", "Confusion matrix"),
    "register": ("confusion_matrix.png", "Confusion matrix of the retrained model"),
}


LOCAL_UI = "http://127.0.0.1:5000"
"""Address at which `make ui` serves the local database."""


def ui_address() -> str:
    """Address of MLflow's UI: the tracking server, or `LOCAL_UI`."""
    uri = without_credentials(os.environ["MLFLOW_TRACKING_URI"])
    return uri.rstrip("/") if uri.startswith("http") else LOCAL_UI


def way_to_experiments() -> str:
    """Address of MLflow's experiments page, in the view for model training (the default view is for chatbots)."""
    address = ui_address()
    before = "make ui, then " if address == LOCAL_UI else ""
    return f"{before}{address}/#/experiments?workflowType=machine_learning"


def run_address() -> str | None:
    """URL of this pass's MLflow run, once it exists in MLflow."""
    parent = read_json(pass_folder(current_pass()[0]) / "parent.json")
    return f"{ui_address()}/#/experiments/{parent['experiment']}/runs/{parent['run']}" if parent else None


def publish_links(stage: str) -> None:
    """Create Prefect artifacts that link to a step's plot, or to the MLflow run (`ingest`); errors are only logged."""
    try:
        if (address := run_address()) is None:
            return
        if stage == "ingest":
            create_link_artifact(address, "MLflow run", key="mlflow-run")
        name, title = LINKED.get(stage, (None, None))
        if name and artifact(stage, name).exists():
            create_link_artifact(f"{address}/artifacts/{stage}/{name}", title, key=f"{stage.replace('_', '-')}-plot")
    except Exception as error:
        get_run_logger().warning("No link to MLflow for %s: %s", stage, mask(str(error)).split("\n")[0])
