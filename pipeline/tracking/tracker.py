"""MLflow: one parent run per pass through the recipe, one child run per step that is executed.

A *pass* is one `unfreeze run`, one `dvc repro`, one run of a deployment. Its key is a tag on the parent run, by which
the processes of its steps find the parent run, regardless of the process that started them.

Records are first written to a journal on disk (`pipeline/tracking/journal.py`), and a thread sends them about once a
second (`pipeline/tracking/sender.py`): importing MLflow takes seconds, and training neither waits for the tracking
server nor fails because of it. Records that are unsent when a step ends are sent by the next process of any pass.
"""

import json
import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.artifacts import STAGES, artifact, write_json
from pipeline.process.secrets import mask
from pipeline.process.signals import dvc_above, identity
from pipeline.provenance import code_tags, description, machine_tags, title
from pipeline.tracking.journal import ROOT, Busy, Journal, Record, pass_folder, read_json
from pipeline.tracking.sender import address, client, is_taken, metrics, reaching, reason, send, waiting_here
from unfreeze.errors import UserError

logger = logging.getLogger("unfreeze")

PASS, DOOR, SWEEP = "UNFREEZE_PASS", "UNFREEZE_DOOR", "UNFREEZE_SWEEP"
"""Environment variables: the key of the pass, its entry point, and, for a trial, the name of its search."""
ADDRESS, OWNER = "UNFREEZE_FLOW_RUN", "UNFREEZE_OWNER"
"""Environment variables: the URL of Prefect's flow run, and the owner of the pass, as `owner` returns it."""
SHOWN = ("*.png", "*.html", "confusion_matrix.csv", "predictions.csv")
"""Files of a step that are logged in addition to its metrics."""
LONGEST_PAUSE = 30.0
"""Longest pause in seconds between two attempts to reach the server."""


def current_pass() -> tuple[str, str]:
    """The key of the pass that this process belongs to, and its entry point.

    The flow sets both in the environment. Without a flow, the nearest `dvc` among the parent processes is the pass.
    Without either, a step started by hand is a separate pass.
    """
    if key := os.environ.get(PASS):
        return key, os.environ.get(DOOR, "flow")
    if above := dvc_above():
        return f"dvc-{identity(above)}", "dvc repro"
    return f"step-{os.getpid()}-{time.time():.0f}", "step"


def owner(attempt: int) -> str:
    """The owner of a pass, ``<attempt>@<host>``; after a worker is lost, there is a new attempt on another host."""
    return f"{attempt}@{socket.gethostname()}"


def begin_journal(stage: str, params: Mapping[str, Any], step_params: Mapping[str, Any]) -> Journal:
    """Create a journal of this pass: for a step, or, without a stage, for the pass itself."""
    key, door = current_pass()
    return Journal(
        {
            "pass": key,
            "door": door,
            "sweep": os.environ.get(SWEEP),
            "stage": stage,
            "execution": str(uuid.uuid4()),
            "owner": os.environ.get(OWNER) or owner(1),
            "address": address(),
            "experiment": os.environ["MLFLOW_EXPERIMENT_NAME"],
            "name": f"{title(params)} · {datetime.now():%d %b %H:%M}",
            "description": description(params, os.environ.get(ADDRESS, "")),
            "when": int(time.time() * 1000),
            "params": {"parent": _shown_params(params), "child": _shown_params(step_params)},
        }
    )


class Delivery:
    """Thread that sends the unsent journals of earlier steps, then the given journal, if any, while it is written."""

    def __init__(self, journal: Journal | None, warn: Callable[..., None] = logger.warning) -> None:
        self._journal, self._warn = journal, warn
        self._closing = threading.Event()
        self._until = math.inf
        self._said = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def close(self) -> bool:
        """After the journal is closed, send the rest, with a timeout; returns whether everything is sent."""
        self._closing.set()
        while self._thread.is_alive() and time.monotonic() < self._until:
            self._thread.join(0.05)
        if not (left := [self._journal.folder] if self._journal else waiting_here()) or not left[0].exists():
            return True
        if self._journal:
            self._journal.sync()
        self._say("no answer in time")
        return False

    def _work(self) -> None:
        pause, closing = 0.0, False
        while not closing:
            closing = self._closing.wait(pause)
            try:
                if self._journal and "source" not in self._journal.head:
                    self._journal.describe(source=code_tags() | machine_tags())
                local = not os.environ["MLFLOW_TRACKING_URI"].startswith("http")
                for seconds in send(client(), self._journal):
                    self._until = math.inf if local else time.monotonic() + seconds
                pause = 1.0
            except Busy:
                pause = 1.0
            except Exception as error:
                self._say(reason(error))
                pause = min(max(1.0, 2 * pause), LONGEST_PAUSE)
            self._until = math.inf

    def _say(self, trouble: str) -> None:
        if not self._said:
            self._said = True
            self._warn(
                "MLflow at %s: %s. Continuing without it; records are queued in %s and sent when MLflow is back,"
                " or with `unfreeze publish`.",
                address(),
                trouble,
                ROOT,
            )


class Tracker:
    """Logs one step's curves, metrics and files to MLflow.

    If the tracking server cannot be reached, this is logged once, and the step continues.
    """

    def __init__(self, stage: str, params: Mapping[str, Any], step_params: Mapping[str, Any]) -> None:
        self.stage = stage
        self._journal = begin_journal(stage, params, step_params)
        self._delivery = Delivery(self._journal)
        self._curves: set[str] = set()

    def curve(self, values: Mapping[str, float], at: int) -> None:
        """Log a point of the step's curves: name -> value, at an iteration or epoch."""
        self._curves |= values.keys()
        self._journal.write(*metrics("child", values, at, time.time()))

    def parent(self) -> str:
        """The id of the pass's parent run, once MLflow has answered.

        Raises:
            Unreachable: MLflow does not answer.
            UserError: another worker has taken over the pass, and owns the run.
        """
        folder = pass_folder(self._journal.head["pass"])
        with reaching():
            while "run" not in (known := read_json(folder / "parent.json")):
                try:
                    for _ in send(client(), self._journal):
                        pass
                except Busy:
                    continue
            if is_taken(client(), self._journal.head, known["run"]):
                raise UserError("Another worker has taken over this run: this one stops.")
        return str(known["run"])

    def close(self, status: str, final: Mapping[str, float], seconds: float) -> None:
        """End the child run as FINISHED, FAILED or KILLED, with the step's final metrics and duration.

        A metric with a curve gets no further point in the child run; the parent run has it as ``<step>/<metric>``.
        """
        now = time.time()
        own = {name: value for name, value in final.items() if name not in self._curves}
        stages = STAGES[: STAGES.index(self.stage) + 1] if status == "FINISHED" else ()
        conclude(
            self._journal,
            stages,
            status,
            [
                *metrics("child", {**own, "seconds": seconds}, 0, now),
                {"run": "child", "status": status, "when": int(now * 1000)},
            ],
        )
        self._delivery.close()


def conclude(journal: Journal, stages: Sequence[str], status: str, before: Sequence[Record] = ()) -> None:
    """Log metrics and files to the parent run, end the run until another step resumes it, and close the journal.

    Args:
        journal: journal of the step or pass that has ended.
        stages: steps whose results are up to date, including those from the cache.
        status: FINISHED, FAILED or KILLED.
        before: records to write first.
    """
    noted_file = pass_folder(journal.head["pass"]) / "noted.json"
    noted = read_json(noted_file)
    records, files = list(before), list[Record]()

    def is_new(path: Path) -> bool:
        """Whether a file is new or changed since an earlier step of the pass logged it."""
        state = [path.stat().st_mtime_ns, path.stat().st_size]
        is_new, noted[str(path)] = noted.get(str(path)) != state, state
        return is_new

    try:
        for stage in stages:
            path = artifact(stage, "metrics.json")
            if path.exists() and is_new(path):
                values = {f"{stage}/{name}": value for name, value in json.loads(path.read_text()).items()}
                records += metrics("parent", values, 0, path.stat().st_mtime)
            for file in shown(stage):
                runs: list[tuple[str, str | None]] = [("parent", stage)] if is_new(file) else []
                if stage == journal.head["stage"]:
                    runs.append(("child", None))
                if runs:
                    copy = journal.keep(file)
                    files += [{"run": run, "file": copy, "to": to} for run, to in runs]
        for file in (Path("params.yaml"), Path("dvc.lock")):
            if file.exists() and is_new(file):
                files.append({"run": "parent", "file": journal.keep(file, text=True), "to": None})
        dataset = artifact("ingest", "dataset.json")
        if dataset.exists():
            fingerprint = json.loads(dataset.read_text())["fingerprint"]
            records.append({"run": "parent", "tag": ["unfreeze.data", fingerprint]})
    except OSError as error:
        logger.warning("Some files cannot be copied for MLflow: %s", error)
    records.append({"run": "parent", "status": status, "when": int(time.time() * 1000)})
    # Files come last: the artifact store may be unreachable while the server answers.
    journal.write(*records, *files, {"closed": True})
    journal.close()
    with suppress(OSError):
        write_json(noted_file, noted)


def shown(stage: str) -> list[Path]:
    """The files of a step that are logged to MLflow (`SHOWN`)."""
    return sorted(path for pattern in SHOWN for path in artifact(stage, "").glob(pattern))


def _shown_params(params: Mapping[str, Any]) -> dict[str, str]:
    return {key: mask(str(value)) for key, value in params.items()}
