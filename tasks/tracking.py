"""MLflow: one parent run per pass through the recipe, one child run per step that is executed.

A *pass* is one `unfreeze run`, one `dvc repro`, one run of a deployment. Its key is a tag on the parent run, so that the
processes of its steps find their parent by themselves, whoever started them.

Importing MLflow takes seconds, so a step talks to it from a thread that starts with the step and sends what has come in
about once a second; training never waits for the tracking server, and never fails because of it.
"""

import json
import logging
import os
import queue
import subprocess
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from tasks import STAGES
from tasks.environment import artifact

logger = logging.getLogger("unfreeze")

PASS_TAG = "unfreeze.pass"
SHOWN = ("*.png", "*.html", "confusion_matrix.csv", "predictions.csv")
"""Files of a step that a person wants beside its numbers."""


def current_pass() -> tuple[str, str]:
    """The key of the pass that this process belongs to, and the door it came through.

    The flow names both in the environment. Without it the nearest `dvc` among the parent processes is the pass; without
    that, a step started by hand is a pass of its own.
    """
    if key := os.environ.get("UNFREEZE_PASS"):
        return key, os.environ.get("UNFREEZE_DOOR", "flow")
    process: psutil.Process | None = psutil.Process()
    while process is not None:
        words = process.cmdline()[:3]
        if any(Path(word).name == "dvc" for word in words):
            return f"dvc-{process.pid}-{process.create_time():.0f}", "dvc repro"
        process = process.parent()
    return f"step-{os.getpid()}-{time.time():.0f}", "step"


class Tracker:
    """Sends one step's curves, metrics and files to MLflow, from a thread.

    The tracking server is no part of the training: when it cannot be reached that is said once, and the step goes on.
    """

    def __init__(self, stage: str, params: Mapping[str, Any], step_params: Mapping[str, Any]) -> None:
        self.stage = stage
        self._params, self._step_params = params, step_params
        self._waiting: queue.SimpleQueue[tuple[int, float, Mapping[str, float]]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._failed: str | None = None
        self._metrics: Mapping[str, float] = {}
        self._client: Any = None
        self._parent = self._child = ""
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def curve(self, values: Mapping[str, float], at: int) -> None:
        """A point of the step's curves: name -> value, at an iteration or epoch."""
        self._waiting.put((at, time.time(), dict(values)))

    def parent(self) -> str:
        """The id of the pass's parent run, once MLflow has answered.

        Raises:
            RuntimeError: MLflow cannot be reached.
        """
        self._ready.wait()
        if not self._parent:
            raise RuntimeError(f"MLflow cannot be reached: {self._failed}")
        return self._parent

    def close(self, metrics: Mapping[str, float] | None, seconds: float) -> None:
        """End the child run with the step's final metrics, or as failed where there are none (None), and how long it took."""
        self._metrics, self._status = metrics or {}, "FAILED" if metrics is None else "FINISHED"
        self._seconds = seconds
        self._closing.set()
        self._thread.join()

    def _work(self) -> None:
        try:
            self._open()
            self._ready.set()
            while not self._closing.wait(1.0):
                self._send()
            self._send()
            self._finish()
        except Exception as error:
            self._failed = f"{type(error).__name__}: {error}".splitlines()[0]
            logger.warning("MLflow at %s: %s. The step goes on without.", _uri(), self._failed)
        finally:
            self._ready.set()

    def _open(self) -> None:
        self._client = client()
        self._parent = find_or_create_parent(self._client, self._params)
        experiment = self._client.get_run(self._parent).info.experiment_id
        tags = {"mlflow.parentRunId": self._parent, "unfreeze.stage": self.stage, **_source_tags()}
        self._child = self._client.create_run(experiment, tags=tags, run_name=self.stage).info.run_id
        log_params(self._client, self._child, self._step_params)

    def _send(self) -> None:
        from mlflow.entities import Metric

        points = []
        while not self._waiting.empty():
            at, when, values = self._waiting.get()
            points += [Metric(k, float(v), int(when * 1000), at) for k, v in values.items() if v is not None]
        for i in range(0, len(points), 1000):  # MLflow takes a thousand at once
            self._client.log_batch(self._child, metrics=points[i : i + 1000])

    def _finish(self) -> None:
        log_metrics(self._client, self._child, {**self._metrics, "seconds": self._seconds})
        for path in shown(self.stage):
            self._client.log_artifact(self._child, str(path))
        self._client.set_terminated(self._child, self._status)
        stages = STAGES[: STAGES.index(self.stage) + 1] if self._status == "FINISHED" else ()
        conclude(self._client, self._parent, stages, self._status)


def _uri() -> str:
    return os.environ["MLFLOW_TRACKING_URI"]


def client() -> Any:
    """An MLflow client for the tracking server of the environment."""
    # MLflow's own migrations announce each of their dozens of steps.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # urllib3 says on import that it could not speak SOCKS, which nobody asked it to.
    warnings.filterwarnings("ignore", message="SOCKS support in urllib3")
    from mlflow import MlflowClient

    return MlflowClient(_uri())


def find_parent(client: Any) -> str | None:
    """The id of this pass's parent run, if a step has made one."""
    experiment = client.get_experiment_by_name(os.environ["MLFLOW_EXPERIMENT_NAME"])
    if experiment is None:
        return None
    key, _ = current_pass()
    found = client.search_runs([experiment.experiment_id], f"tags.`{PASS_TAG}` = '{key}'", max_results=1)
    return found[0].info.run_id if found else None


def find_or_create_parent(client: Any, params: Mapping[str, Any]) -> str:
    """The id of this pass's parent run, running."""
    if parent := find_parent(client):
        client.update_run(parent, status="RUNNING")
        return parent
    name = os.environ["MLFLOW_EXPERIMENT_NAME"]
    experiment = client.get_experiment_by_name(name)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
    key, door = current_pass()
    tags = {PASS_TAG: key, "unfreeze.door": door, **_source_tags()}
    parent = client.create_run(experiment_id, tags=tags, run_name=_run_name(params)).info.run_id
    log_params(client, parent, params)
    return str(parent)


def conclude(client: Any, parent: str, stages: Sequence[str], status: str) -> None:
    """Put everything that a person compares on the parent run, and end it until another step takes it up.

    Args:
        client: an MLflow client.
        parent: id of the parent run.
        stages: the steps whose results are up to date, also those that came from the cache.
        status: FINISHED or FAILED.
    """
    for stage in stages:
        path = artifact(stage, "metrics.json")
        if path.exists():
            metrics = {f"{stage}/{name}": value for name, value in json.loads(path.read_text()).items()}
            log_metrics(client, parent, metrics)
        for file in shown(stage):
            client.log_artifact(parent, str(file), stage)
    for name in ("params.yaml", "dvc.lock"):
        if Path(name).exists():
            client.log_artifact(parent, name)
    dataset = artifact("ingest", "dataset.json")
    if dataset.exists():
        client.set_tag(parent, "unfreeze.data", json.loads(dataset.read_text())["fingerprint"])
    client.set_terminated(parent, status)


def shown(stage: str) -> list[Path]:
    """The files of a step that a person wants to see."""
    return sorted(path for pattern in SHOWN for path in artifact(stage, "").glob(pattern))


def log_params(client: Any, run: str, params: Mapping[str, Any]) -> None:
    """Log parameters, which MLflow takes by the hundred."""
    from mlflow.entities import Param

    items = [Param(key, str(value)) for key, value in params.items()]
    for i in range(0, len(items), 100):
        client.log_batch(run, params=items[i : i + 100])


def log_metrics(client: Any, run: str, metrics: Mapping[str, float]) -> None:
    """Log final metrics."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    client.log_batch(run, metrics=[Metric(key, float(value), now, 0) for key, value in metrics.items()])


def _run_name(params: Mapping[str, Any]) -> str:
    source = Path(str(params["data.source"]).removeprefix("sample:")).stem
    backbone = str(params["backbone.name"]).split(":")[-1]
    return f"{source} · {backbone} · {params['data.image_size']} px · {datetime.now():%d %b %H:%M}"


def _source_tags() -> dict[str, str]:
    """The git commit and whether the working tree differs from it, where there is git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = "yes" if git("status", "--porcelain", "--untracked-files=no") else "no"
        return {"mlflow.source.git.commit": git("rev-parse", "HEAD"), "unfreeze.changed": changed}
    except (OSError, subprocess.CalledProcessError):
        return {}
