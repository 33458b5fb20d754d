"""A deployment on a work pool, with a real Prefect server, worker and MLflow server."""

import json
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from pipeline.artifacts import STAGES
from tests.integration.project import Project
from tests.integration.servers import ask, at_work, deploy, errors_in, free_port, started, until, wait_for
from unfreeze.settings.overrides import apply_overrides

WORKER = ("prefect", "worker", "start", "--pool", "gpu", "--limit", "1")


@dataclass
class Team:
    """A project with its own Prefect server, worker and MLflow server."""

    project: Project
    home: Path
    prefect: str
    mlflow: str
    logs: Path
    worker: subprocess.Popen[bytes] | None = None

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def deploy(self) -> None:
        """Run `make deploy` in the project."""
        deploy(self.project)

    def commit(self) -> str:
        """Commit the changes in the checkout; returns the commit."""
        git = ("git", "-c", "user.name=t", "-c", "user.email=t@t")
        for words in (["add", "-A"], ["commit", "-qm", "change"]):
            subprocess.run([*git, *words], cwd=self.project.folder, check=True)
        return self.project.git("rev-parse", "HEAD")

    def finish_a_run(self, **parameters: Any) -> dict[str, Any]:
        """Run the deployment as a user does, and wait for its end. The run must succeed; returns the flow run."""
        words = [word for name, value in parameters.items() for word in ("--param", f"{name}={json.dumps(value)}")]
        printed = self.project.run("prefect", "deployment", "run", "recipe/nightly", "--watch", *words, code=None)
        assert "finished successfully" in printed, printed + self.log("worker").read_text()
        run = re.findall(r"UUID: (\S+)", printed)[0]
        return dict(self.request(f"flow_runs/{run}"))

    def said(self, run: str) -> str:
        """The log of a flow run."""
        wanted = {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200}
        return "\n".join(record["message"] for record in self.request("logs/filter", wanted))

    def runs(self) -> list[Any]:
        """MLflow runs, newest first."""
        mlflow = MlflowClient(self.mlflow)
        experiment = mlflow.get_experiment_by_name("unfreeze")
        return list(mlflow.search_runs([experiment.experiment_id], order_by=["start_time DESC"])) if experiment else []

    def parent_runs(self) -> list[Any]:
        """The parent runs among the MLflow runs."""
        return [run for run in self.runs() if "mlflow.parentRunId" not in run.data.tags]

    def request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send a request to the Prefect server: POST with a body, GET without."""
        return ask(f"{self.prefect}/{path}", body)

    def scheduled_by_itself(self, *states: str, seconds: float) -> list[dict[str, Any]]:
        """Flow runs in these states that the schedule created; waits for the first one."""
        wanted = {"flow_runs": {"state": {"type": {"any_": states}}}}
        end = time.monotonic() + seconds
        while True:
            runs = [run for run in self.request("flow_runs/filter", wanted) if run["auto_scheduled"]]
            if runs or time.monotonic() > end:
                return runs
            time.sleep(1)

    def server_errors(self) -> list[str]:
        """Records of the Prefect server's log that report an error, each with its traceback.

        One error is left out: "database is locked" for a worker's heartbeat. Prefect reads and then writes in one
        deferred transaction. SQLite rejects the write at once if another transaction wrote in the meantime. The worker
        sends heartbeats again.
        """
        heartbeat = "Worker channel heartbeat persistence failed"
        errors = errors_in(self.log("server"))
        return [record for record in errors if not (heartbeat in record and "database is locked" in record)]


@pytest.fixture(scope="module")
def team(make_project: Callable[[], Project], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """Servers and a worker, with the deployment that `make deploy` creates."""
    project = make_project()
    home = project.folder.parent / "home"
    project.environment["UNFREEZE_HOME"] = str(home)
    photos = project.folder.parent / "photos"
    apply_overrides(project.folder / "params.yaml", [f"data.source={photos}"])
    (project.folder / "settings").mkdir()
    (project.folder / "settings/team.yaml").write_text("unfreeze: {lr_ratio: 4}\n")
    prefect_port, mlflow_port = free_port(), free_port()
    api, tracking = f"http://127.0.0.1:{prefect_port}/api", f"http://127.0.0.1:{mlflow_port}"
    project.environment |= {"PREFECT_API_URL": api, "MLFLOW_TRACKING_URI": tracking}
    project.environment["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
    team = Team(project, home, api, tracking, tmp_path_factory.mktemp("logs"))
    team.commit()
    prefect_server = ("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(prefect_port))
    mlflow_server = ("mlflow", "server", "--host", "127.0.0.1", "--port", str(mlflow_port), "--workers", "1")
    with (
        started(project, team.log("server"), *prefect_server),
        started(project, team.log("mlflow"), *mlflow_server, "--backend-store-uri", f"sqlite:///{team.logs}/served.db"),
    ):
        wait_for(f"{api}/health", team.log("server"))
        wait_for(f"{tracking}/health", team.log("mlflow"))
        team.deploy()
        with started(project, team.log("worker"), *WORKER) as team.worker:
            yield team


@pytest.fixture
def every_minute(team: Team) -> Iterator[None]:
    """Deploy with a schedule of every minute, and pause the deployment afterwards."""
    file = team.project.folder / "prefect.yaml"
    nightly = file.read_text()
    file.write_text(re.sub(r'cron: "[^"]*"', 'cron: "* * * * *"', nightly))
    assert file.read_text() != nightly
    team.deploy()
    yield
    deployment = team.request("deployments/name/recipe/nightly")["id"]
    team.request(f"deployments/{deployment}/pause_deployment", {})


def test_a_deployment_has_scheduled_runs_within_two_minutes(team: Team) -> None:
    runs = team.scheduled_by_itself("SCHEDULED", seconds=120)
    assert runs, team.log("server").read_text()
    assert team.server_errors() == []


def test_a_run_has_its_own_settings_and_leaves_the_checkout_as_it_is(team: Team) -> None:
    run = team.finish_a_run(settings={"train_full.cycles": 2}, settings_file="settings/team.yaml", until="explore")
    assert run["name"] == "photos · test_efficientnet · 32 px · unfreeze.lr_ratio=4.0, train_full.cycles=2"
    assert team.project.git("status", "--porcelain") == ""
    assert not [
        name
        for name in ("artifacts", ".unfreeze", "mlflow.db", ".dvc/config.local")
        if (team.project.folder / name).exists()
    ]
    assert list((team.home / "workspaces").iterdir()) == []

    (parent,) = team.parent_runs()
    assert len(team.runs()) == 1 + len(["ingest", "explore"])
    assert {run.info.status for run in team.runs()} == {"FINISHED"}
    assert parent.data.tags["unfreeze.door"] == "deployment"
    assert parent.data.params["train_full.cycles"] == "2" and parent.data.params["unfreeze.lr_ratio"] == "4.0"
    assert parent.data.tags["mlflow.source.git.commit"] == team.project.git("rev-parse", "HEAD")
    assert parent.data.tags["unfreeze.changed"] == "no"
    description = parent.data.tags["mlflow.note.content"]
    assert f"/runs/flow-run/{run['id']}" in description and socket.gethostname() in description
    assert "train_full.cycles=2" in description


def test_the_next_run_uses_what_was_committed_since_and_inherits_no_settings(team: Team) -> None:
    file = team.project.folder / "tasks/explore.py"
    file.write_text(file.read_text().replace("    return metrics", '    return {**metrics, "committed_since": 1.0}'))
    commit = team.commit()
    run = team.finish_a_run()
    assert run["name"] == "photos · test_efficientnet · 32 px"
    newest = team.parent_runs()[0]
    steps = [one for one in team.runs() if one.data.tags.get("mlflow.parentRunId") == newest.info.run_id]
    assert len(steps) == len(STAGES) - 1  # ingest was finished before, with the same images
    assert {one.info.status for one in [newest, *steps]} == {"FINISHED"}
    links = team.project.run("prefect", "artifact", "ls")
    for key in ("mlflow-run", "lr-find-plot", "evaluate-plot"):
        assert key in links
    assert newest.data.tags["mlflow.source.git.commit"] == commit
    assert newest.data.metrics["explore/committed_since"] == 1.0
    assert newest.data.params["train_full.cycles"] == "1" and newest.data.params["unfreeze.lr_ratio"] == "3.0"


def test_what_a_person_has_paused_stays_paused(team: Team) -> None:
    def is_paused() -> tuple[bool, bool]:
        deployment = team.request("deployments/name/recipe/nightly")
        return deployment["paused"], not deployment["schedules"][0]["active"]

    deployment = team.request("deployments/name/recipe/nightly")
    schedule = ("recipe/nightly", deployment["schedules"][0]["id"])
    assert is_paused() == (False, False)
    team.project.run("prefect", "deployment", "schedule", "pause", *schedule)
    team.request(f"deployments/{deployment['id']}/pause_deployment", {})
    team.deploy()
    assert is_paused() == (True, True)
    team.project.run("prefect", "deployment", "schedule", "resume", *schedule)
    team.request(f"deployments/{deployment['id']}/resume_deployment", {})


def test_a_schedule_of_every_minute_starts_runs_by_itself(team: Team, every_minute: None) -> None:
    """An earlier test has finished all steps, so a run takes seconds."""
    runs = team.scheduled_by_itself("COMPLETED", "FAILED", "CRASHED", seconds=300)
    assert {run["state_type"] for run in runs} == {"COMPLETED"}, team.log("worker").read_text()
    assert team.server_errors() == []


@pytest.mark.long
def test_an_equal_run_waits_a_cancelled_one_ends_and_a_killed_worker_leaves_nothing(team: Team) -> None:
    project, worker = team.project, team.worker
    assert worker is not None

    def start() -> str:
        """Start a run with a seed that no other test uses; returns its ID."""
        printed = project.run("prefect", "deployment", "run", "recipe/nightly", "--param", 'settings={"seed": 7}')
        return re.findall(r"UUID: (\S+)", printed)[0]

    def statuses() -> str:
        return " ".join(run.info.status for run in team.runs())

    first = start()
    until(lambda: "RUNNING" in statuses())
    family = at_work(worker.pid)
    with started(project, team.log("second"), *WORKER, "--name", "second") as second_worker:
        # A second run with the same settings, on another worker, logs this and waits.
        second = start()
        waits = "computes the same (" + team.prefect.removesuffix("/api") + f"/runs/flow-run/{first})"
        until(lambda: waits in team.said(second), why=lambda: team.said(second))

        # A user cancels the first run in Prefect. Its step ends, the worker goes on, and nothing is reported as failed.
        project.run("prefect", "flow-run", "cancel", first)
        _, left = psutil.wait_procs(family, timeout=90)
        assert not left, [process.cmdline() for process in left]
        assert worker.poll() is None, team.log("worker").read_text()
        until(lambda: team.request(f"flow_runs/{first}")["state_type"] == "CANCELLED")
        assert set(statuses().split()) <= {"FINISHED", "KILLED", "RUNNING"}, statuses()
        assert "KILLED" in statuses()

        # The second run continues where the first one stopped. Its worker is killed, and that worker's processes end.
        family = at_work(second_worker.pid)
        second_worker.kill()
        gone, left = psutil.wait_procs(family, timeout=60)
        assert gone and not left, [process.cmdline() for process in left]
        # The run itself does not end: another worker continues it after Prefect misses its heartbeats.
        states = [one["name"] for one in team.request(f"flow_run_states/?flow_run_id={second}")]
        assert "Running" in states and "Crashed" not in states
