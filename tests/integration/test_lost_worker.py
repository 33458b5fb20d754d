"""A worker is lost in the middle of a training.

The servers are real, the two workers have separate folders, and DVC's remote is a folder.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from safetensors import safe_open

from pipeline.artifacts import STAGES
from tests.integration.project import SMALL, Project, make_project
from tests.integration.servers import at_work, free_port, started, until, wait_for
from tests.integration.test_deployment import Team
from unfreeze.settings.overrides import apply_overrides

pytestmark = pytest.mark.long

SETTINGS = SMALL | {"batch_size": "2", "train_full.cycle_len": "40", "checkpoint.batches": "5"}
PULL = """
import os

def checkout():
    os.chdir(os.environ["CHECKOUT"])
    return {"directory": os.environ["CHECKOUT"]}
"""


def clone(project: Project, base: Path) -> Project:
    """Another machine: a separate folder and home, and the same images."""
    base.mkdir()
    subprocess.run(["git", "clone", "-q", project.folder, base / "project"], check=True)
    shutil.copytree(project.folder.parent / "photos", base / "photos")
    home = {"HOME": str(base), "PREFECT_HOME": str(base / "prefect"), "CHECKOUT": str(base / "project")}
    return Project(base / "project", project.environment | home)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Team]:
    """Servers, and a deployment whose runs use the checkout of their worker."""
    (tmp_path / "first").mkdir()
    (tmp_path / "pull").mkdir()
    (tmp_path / "pull/pull_step.py").write_text(PULL)
    project = make_project(tmp_path / "first", SETTINGS)
    prefect_port, mlflow_port = free_port(), free_port()
    api, tracking = f"http://127.0.0.1:{prefect_port}/api", f"http://127.0.0.1:{mlflow_port}"
    project.environment |= {
        "PREFECT_API_URL": api,
        "MLFLOW_TRACKING_URI": tracking,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "CHECKOUT": str(project.folder),
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "pull"), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    project.run("dvc", "remote", "add", "--default", "team", str(tmp_path / "remote"))
    file = project.folder / "prefect.yaml"
    file.write_text(re.sub(r"flows\.workspace\.prepare: .*", "pull_step.checkout: {}", file.read_text()))
    commit = ("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qam", "team")
    subprocess.run(commit, cwd=project.folder, check=True)
    team = Team(project, tmp_path / "first", api, tracking, tmp_path)
    prefect_server = ("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(prefect_port))
    mlflow_server = ("mlflow", "server", "--host", "127.0.0.1", "--port", str(mlflow_port), "--workers", "1")
    with (
        started(project, team.log("server"), *prefect_server),
        started(project, team.log("mlflow"), *mlflow_server, "--backend-store-uri", f"sqlite:///{tmp_path}/served.db"),
    ):
        wait_for(f"{api}/health", team.log("server"))
        wait_for(f"{tracking}/health", team.log("mlflow"))
        team.deploy()
        yield team


def iteration(file: Path) -> int:
    """Iteration at which a checkpoint was saved; 0 if the file does not exist."""
    if not file.exists():
        return 0
    with safe_open(file, "np") as opened:
        return int(json.loads(opened.metadata()["numbers"])["position"]["iteration"])


@pytest.mark.timeout(2400)  # because the machine may be busy
def test_another_worker_goes_on_in_the_middle_of_an_epoch_and_the_first_one_leaves_the_run_alone(
    machines: Team, tmp_path: Path
) -> None:
    team, first = machines, machines.project
    second, undisturbed = clone(first, tmp_path / "second"), clone(first, tmp_path / "undisturbed")
    worker = ("prefect", "worker", "start", "--pool", "gpu", "--limit", "1")

    with ExitStack() as stack:
        lost = stack.enter_context(started(first, team.log("first"), *worker, "--name", "first"))
        printed = first.run("prefect", "deployment", "run", "recipe/nightly")
        run = re.findall(r"UUID: (\S+)", printed)[0]
        at_work(lost.pid)
        stack.enter_context(started(second, team.log("second"), *worker, "--name", "second"))

        def shared() -> int:
            found = list((tmp_path / "remote.checkpoints/train_full").glob("*/training.safetensors"))
            return iteration(found[0]) if found and not (first.folder / ".unfreeze/to-push").exists() else 0

        until(lambda: shared() >= 20, 300, team.log("first").read_text)
        for process in [*psutil.Process(lost.pid).children(recursive=True), psutil.Process(lost.pid)]:
            process.kill()
        killed = datetime.now(UTC)
        came = shared()
        apply_overrides(undisturbed.folder / "params.yaml", ["checkpoint.share=none"])
        undisturbed.environment.pop("MLFLOW_TRACKING_URI")
        undisturbed.run("dvc", "repro", "train_full")

        def state() -> dict[str, Any]:
            return dict(team.request(f"flow_runs/{run}"))

        until(lambda: state()["run_count"] == 2, 240, team.log("server").read_text)
        until(lambda: state()["state_type"] in ("COMPLETED", "FAILED", "CRASHED"), 600, team.log("second").read_text)
        assert state()["state_type"] == "COMPLETED", team.log("second").read_text()
        states = team.request(f"flow_run_states/?flow_run_id={run}")
        _, again = sorted((one for one in states if one["name"] == "Running"), key=lambda one: one["timestamp"])
        assert datetime.fromisoformat(again["timestamp"]) - killed < timedelta(minutes=3)

    log = team.log("second").read_text()
    epoch, batch = map(int, re.findall(r"goes on in epoch (\d+), batch (\d+), from a checkpoint", log)[0])
    assert epoch > 1 and batch > 1 and came > 0, (epoch, batch, came)
    weights = Path("artifacts/train_full/model.safetensors")
    assert (second.folder / weights).read_bytes() == (undisturbed.folder / weights).read_bytes()
    assert not list((tmp_path / "remote.checkpoints").rglob("*.safetensors"))

    def logged() -> dict[str, list[str]]:
        """States of the runs in MLflow, by name."""
        client = MlflowClient(team.mlflow)
        experiment = client.get_experiment_by_name("unfreeze")
        assert experiment is not None
        found: dict[str, list[str]] = {}
        for one in client.search_runs([experiment.experiment_id]):
            stage = one.data.tags.get("unfreeze.stage", "pass")
            found.setdefault(stage, []).append(one.info.status)
        return {stage: sorted(states) for stage, states in found.items()}

    right = {stage: ["FINISHED"] for stage in ("pass", *STAGES)} | {"train_full": ["FINISHED", "KILLED"]}
    assert logged() == right
    assert "Sent to MLflow" in first.run("flows.cli", "publish")
    assert logged() == right
