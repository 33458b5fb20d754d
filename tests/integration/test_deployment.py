"""The third door: a deployment on a work pool, with a real Prefect server, worker and MLflow server."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from mlflow import MlflowClient

from tasks import STAGES
from tests.integration.project import Project


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def started(project: Project, log: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server or worker in a process group of its own, which is ended as a whole."""
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=project.folder,
            env=project.environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # a test may have killed it
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(address: str, log: Path) -> None:
    for _ in range(240):
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text())


def test_a_deployment_on_the_gpu_pool_runs_the_recipe(make_project: Callable[[], Project], tmp_path: Path) -> None:
    project = make_project()
    prefect_port, mlflow_port = free_port(), free_port()
    project.environment["PREFECT_API_URL"] = f"http://127.0.0.1:{prefect_port}/api"
    project.environment["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
    tracking = f"http://127.0.0.1:{mlflow_port}"
    server_log, mlflow_log, worker_log = (tmp_path / name for name in ("server.log", "mlflow.log", "worker.log"))
    mlflow_server = ("mlflow", "server", "--host", "127.0.0.1", "--port", str(mlflow_port), "--workers", "1")
    with (
        started(project, server_log, "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(prefect_port)),
        started(project, mlflow_log, *mlflow_server, "--backend-store-uri", f"sqlite:///{tmp_path}/served.db"),
    ):
        wait_for(f"http://127.0.0.1:{prefect_port}/api/health", server_log)
        wait_for(f"{tracking}/health", mlflow_log)
        project.environment["MLFLOW_TRACKING_URI"] = tracking
        project.run("prefect", "work-pool", "create", "gpu", "--type", "process")
        project.run("prefect", "--no-prompt", "deploy", "--all")
        deployment = project.run("prefect", "deployment", "inspect", "recipe/nightly")
        assert "0 2 * * *" in deployment and "gpu" in deployment

        with started(project, worker_log, "prefect", "worker", "start", "--pool", "gpu"):
            # As a person triggers it, with a setting of one's own, waiting for its end.
            parameters = 'settings={"train_full.cycles": 2}'
            command = ("prefect", "deployment", "run", "recipe/nightly", "--watch", "--param", parameters)
            output = project.run(*command, code=None)
        assert "finished successfully" in output, output + worker_log.read_text()
        assert "up to date" in project.run("dvc", "status")

        mlflow = MlflowClient(tracking)
        experiment = mlflow.get_experiment_by_name("unfreeze")
        assert experiment is not None
        runs = mlflow.search_runs([experiment.experiment_id])
        parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        assert len(runs) == 1 + len(STAGES) and len(parents) == 1
        assert parents[0].data.tags["unfreeze.door"] == "deployment"
        assert parents[0].data.params["train_full.cycles"] == "2"
        links = project.run("prefect", "artifact", "ls")
        for key in ("mlflow-run", "lr-find-plot", "evaluate-plot"):
            assert key in links

        # A person cancels a pass in Prefect's pages: its step ends, the worker goes on, and nothing says that it failed.
        with started(project, worker_log, "prefect", "worker", "start", "--pool", "gpu") as worker:
            seven = ("--param", 'settings={"seed": 7}')
            printed = project.run("prefect", "deployment", "run", "recipe/nightly", *seven)
            run = re.findall(r"UUID: (\S+)", printed)[0]

            def statuses() -> str:
                return " ".join(r.info.status for r in mlflow.search_runs([experiment.experiment_id]))

            assert "RUNNING" in wait_until(statuses, "RUNNING")
            family = at_work(worker.pid)
            project.run("prefect", "flow-run", "cancel", run)
            _, left = psutil.wait_procs(family, timeout=90)
            assert not left, [process.cmdline() for process in left]
            assert worker.poll() is None, worker_log.read_text()
            assert "CANCELLED" in wait_until(lambda: project.run("prefect", "flow-run", "inspect", run), "CANCELLED")
            assert set(statuses().split()) == {"FINISHED", "KILLED"}, statuses()

            # Then the worker itself is killed in the middle of a pass: what it started ends with it.
            project.run("prefect", "deployment", "run", "recipe/nightly", *seven)
            family = at_work(worker.pid)
            worker.kill()
            gone, left = psutil.wait_procs(family, timeout=60)
            assert gone and not left, [process.cmdline() for process in left]


def at_work(pid: int) -> list[psutil.Process]:
    """Wait until a step of a worker's flow is at work; returns all processes that the worker has started."""
    for _ in range(1200):
        family = psutil.Process(pid).children(recursive=True)
        for process in family:
            with suppress(psutil.Error):
                if "tasks" in process.cmdline():  # python -m tasks <step>
                    return family
        time.sleep(0.1)
    raise AssertionError("no step began")


def wait_until(look: Callable[[], str], word: str) -> str:
    """Look until the word is there, for a minute; returns what was seen last."""
    end = time.monotonic() + 60
    while word not in (seen := look()) and time.monotonic() < end:
        time.sleep(0.2)
    return seen
