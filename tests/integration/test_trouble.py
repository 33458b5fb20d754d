"""Problems in a pass: MLflow, DVC's remote or Prefect's server unavailable, a bad image, a damaged `dvc.lock`."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.artifacts import STAGES
from tests.integration.project import Project
from tests.integration.servers import free_port, started, wait_for

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def project(make_project: Callable[[], Project], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project with all steps done, and a Prefect server."""
    project, port = make_project(), free_port()
    project.environment["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    log = tmp_path_factory.mktemp("logs") / "server.log"
    with started(project, log, "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)):
        wait_for(f"http://127.0.0.1:{port}/api/health", log)
        project.run("flows.cli", "run")
        yield project


def make_stale(project: Project) -> None:
    """Change the code of `explore`, so that only this step is stale."""
    code = project.folder / "tasks/explore.py"
    code.write_text(code.read_text() + "\n# a change\n")


def test_a_pass_goes_on_while_mlflow_and_the_remote_are_away(project: Project) -> None:
    alone = Project(project.folder, project.environment | {"MLFLOW_TRACKING_URI": "http://a:b@127.0.0.1:9"})
    (project.folder / "in the way").touch()
    project.run("dvc", "remote", "add", "-d", "away", str(project.folder / "in the way/remote"))
    make_stale(project)
    output = alone.run("flows.cli", "run")
    assert output.count("Continuing without it") == 2  # once from the step, once from the pass
    assert "not yet sent to MLflow at http://***@127.0.0.1:9." in output and "a:b@" not in output
    assert "Not everything was pushed to DVC's remote" in output and "Traceback" not in output

    assert "does not answer (connection refused)" in alone.run("flows.cli", "publish", code=1)
    (project.folder / "in the way").unlink()
    output = project.run("flows.cli", "publish", code=1)  # the records are for another server
    assert "Pushed to DVC's remote" in output and "--anyway" in output
    assert "Sent to MLflow" in project.run("flows.cli", "publish", "--anyway")
    assert "Nothing waits" in project.run("flows.cli", "publish")
    parents, _ = project.runs()
    assert len(parents) == 2 and parents[0].info.status == "FINISHED"
    for stage in STAGES:
        for name in json.loads((project.folder / "artifacts" / stage / "metrics.json").read_text()):
            assert f"{stage}/{name}" in parents[0].data.metrics


def test_what_the_cache_lacks_is_computed_when_the_remote_is_away(project: Project) -> None:
    remote = project.folder / "in the way"
    shutil.rmtree(remote, ignore_errors=True)
    remote.write_text("")
    project.run("dvc", "remote", "add", "-f", "-d", "away", str(remote / "remote"))
    for out in yaml.safe_load((project.folder / "dvc.lock").read_text())["stages"]["explore"]["outs"]:
        (project.folder / ".dvc/cache/files/md5" / out["md5"][:2] / out["md5"][2:]).unlink()
    (project.folder / "artifacts/explore/report.html").unlink()
    output = project.run("flows.cli", "run")
    assert output.count("DVC's remote cannot be used") == 1 and "Traceback" not in output
    assert (project.folder / "artifacts/explore/report.html").exists()
    project.run("dvc", "remote", "remove", "away")
    (project.folder / ".unfreeze/about-cache/to-push").unlink()


def test_a_pass_that_fails_does_not_say_that_nothing_is_left(project: Project) -> None:
    photo = project.folder.parent / "photos/dark/00.png"
    whole = photo.read_bytes()
    photo.write_bytes(whole[: len(whole) // 2])  # its header is valid, so only decoding fails
    output = project.run("flows.cli", "run", "-S", "data.max_broken=0", code=1)
    assert "ingest: " in output and "Nothing to run" not in output and "Traceback" not in output
    assert output.count("dark/00.png: ") == 2  # once in the log, once at the end
    photo.write_bytes(whole)
    back = project.run("flows.cli", "run", "-S", "data.max_broken=0.05")
    assert "Nothing to run" in back  # the outputs come from the cache


def test_a_lock_file_that_was_cut_off_costs_nothing(project: Project) -> None:
    lock = project.folder / "dvc.lock"
    whole = lock.read_text()
    lock.write_text(whole[: whole.index("path:") + 3])
    output = project.run("flows.cli", "run")
    assert "dvc.lock.damaged" in output and "Nothing to run" in output
    assert lock.read_text() == whole
    assert project.ran(project.run("dvc", "repro")) == []
    (project.folder / "dvc.lock.damaged").unlink()


def test_a_pass_goes_on_when_prefects_server_is_away_from_the_start(project: Project) -> None:
    environment = project.environment | {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    output = Project(project.folder, environment).run("flows.cli", "run")
    assert output.count("Prefect's server at http://127.0.0.1:9/api does not answer. The run continues") == 1
    assert "Nothing to run" in output


def test_a_pass_goes_on_when_prefects_server_dies(project: Project, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "server.log"
    address = f"http://127.0.0.1:{port}/api"
    environment = project.environment | {"PREFECT_API_URL": address, "PREFECT_CLIENT_MAX_RETRIES": "2"}
    make_stale(project)
    server = ("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-services")
    with started(project, log, *server):
        wait_for(f"{address}/health", log)
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "run"], cwd=project.folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert process.stdout is not None
        output = ""
        for line in process.stdout:
            output += line
            if "ingest" in line and "Finished" in line:
                break
    output += process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert output.count("does not answer. The run continues with a temporary one") == 1
    assert "Prefect's server" in output and project.run("dvc", "status").count("up to date") == 1
    parents, children = project.runs()
    assert [run.data.tags["mlflow.parentRunId"] for run in children].count(parents[0].info.run_id) == 1
