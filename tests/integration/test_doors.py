"""The commands `unfreeze run` and `dvc repro` give the same results, with real Prefect, DVC and MLflow."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from pipeline.artifacts import STAGES
from tests.integration.project import Project
from unfreeze.settings.overrides import apply_overrides

AFTER_FULL = ["train_full", "evaluate", "retrain", "register"]


@pytest.fixture(scope="module")
def flow_project(make_project: Callable[[], Project]) -> Project:
    project = make_project()
    project.first = project.run("flows.cli", "run")
    return project


def check_tracking(project: Project, door: str) -> None:
    """Check for one parent run with everything that users compare, and one child run with its curves for every step."""
    parents, children = project.runs()
    assert len(parents) == 1 and parents[0].data.tags["unfreeze.door"] == door
    assert parents[0].info.status == "FINISHED"
    assert sorted(run.info.run_name for run in children) == sorted(STAGES)
    assert all(run.info.status == "FINISHED" for run in children)
    for stage in STAGES:
        for name, value in json.loads((project.folder / "artifacts" / stage / "metrics.json").read_text()).items():
            assert parents[0].data.metrics[f"{stage}/{name}"] == pytest.approx(value)
    assert parents[0].data.params["train_full.cycles"] == "1"
    files = {f.path for f in project.mlflow.list_artifacts(parents[0].info.run_id)}
    assert {"params.yaml", "dvc.lock", "evaluate", "explore", "lr_find"} <= files
    full = next(run for run in children if run.info.run_name == "train_full")
    history = project.mlflow.get_metric_history(full.info.run_id, "loss")
    rows = (project.folder / "artifacts/train_full/batches.csv").read_text().splitlines()[1:]
    assert [point.step for point in sorted(history, key=lambda p: p.step)] == list(range(len(rows)))


def test_the_flow_runs_everything_and_says_so(flow_project: Project) -> None:
    output = flow_project.first
    assert "\r" not in output
    assert "with TTA" in output and "logistic regression" in output
    for stage in STAGES:
        assert (flow_project.folder / "artifacts" / stage / "metrics.json").exists()
    check_tracking(flow_project, "flow")
    version = flow_project.mlflow.get_registered_model("unfreeze").latest_versions[0].version
    assert int(version) == 1


def test_after_the_flow_nothing_is_left_to_do(flow_project: Project) -> None:
    assert "up to date" in flow_project.run("dvc", "status")
    assert flow_project.ran(flow_project.run("dvc", "repro")) == []
    again = flow_project.run("flows.cli", "run")
    assert "Nothing to run" in again
    assert again.count("cached") == len(STAGES)
    assert "flow run" not in again  # no server is started only to say so
    assert len(flow_project.runs()[0]) == 1


def test_predict(flow_project: Project, tmp_path: Path) -> None:
    for name, level in (("light photo.jpg", 175), ("dark.jpg", 75)):
        Image.new("RGB", (90, 60), (level,) * 3).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no image")
    output = flow_project.run("flows.cli", "predict", str(tmp_path), "--csv", code=1)
    lines = output.strip().splitlines()
    assert lines[0] == "path,predicted,p_bright,p_dark,reason" and len(lines) == 4
    assert "not an image" in next(line for line in lines if "broken" in line)


def test_served_model_answers(flow_project: Project) -> None:
    import base64
    import io

    buffer = io.BytesIO()
    Image.new("RGB", (50, 50), (170, 170, 170)).save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    code = (
        "import mlflow, pandas as pd; mlflow.set_tracking_uri('sqlite:///mlflow.db'); "
        "model = mlflow.pyfunc.load_model('models:/unfreeze/1'); "
        f"print(list(model.predict(pd.DataFrame({{'image': ['{text}']}})).columns))"
    )
    (flow_project.folder / "ask.py").write_text(code)
    assert "p_bright" in flow_project.run("ask")


@pytest.mark.long
def test_the_same_model_again(flow_project: Project) -> None:
    """Outputs come from the cache. A missing output is computed, and a model unknown to MLflow is reported."""
    output = flow_project.run("flows.cli", "reproduce", "models:/unfreeze/1")
    assert "Nothing was computed" in output and "Weights: equal to those of dvc.lock and models:/unfreeze/1" in output
    parents, _ = flow_project.runs()
    lock = yaml.safe_load((flow_project.folder / "dvc.lock").read_text())
    md5 = next(out["md5"] for out in lock["stages"]["retrain"]["outs"] if out["path"].endswith("predictions.csv"))
    (flow_project.folder / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).unlink()
    output = flow_project.run("flows.cli", "reproduce", parents[0].info.run_id, "--into", "../again")
    assert "Computed: retrain." in output and "Weights: equal to" in output and "Traceback" not in output
    assert "does not know models:/unfreeze/9" in flow_project.run(
        "flows.cli", "reproduce", "models:/unfreeze/9", code=2
    )


def test_a_wrong_setting_is_refused_before_anything_runs(flow_project: Project) -> None:
    before = (flow_project.folder / "params.yaml").read_text()
    output = flow_project.run("flows.cli", "run", "-S", "train_full.cylces=2", code=2)
    assert "train_full.cycles" in output and "Traceback" not in output
    output = flow_project.run("flows.cli", "run", "-S", "data.valid=1.5", code=2)
    assert "data.valid" in output and "Traceback" not in output
    assert (flow_project.folder / "params.yaml").read_text() == before


@pytest.fixture(scope="module")
def dvc_project(make_project: Callable[[], Project]) -> Project:
    project = make_project()
    project.first = project.run("dvc", "repro")
    return project


@pytest.mark.long
def test_dvc_alone_does_and_tracks_the_same(dvc_project: Project) -> None:
    assert dvc_project.ran(dvc_project.first) == list(STAGES)
    check_tracking(dvc_project, "dvc repro")


@pytest.mark.long
def test_same_seed_same_weights_through_either_door(flow_project: Project, dvc_project: Project) -> None:
    for stage in ("train_head/head", "train_augmented/head", "train_full/model", "retrain/model"):
        one, other = (p.folder / "artifacts" / f"{stage}.safetensors" for p in (flow_project, dvc_project))
        assert one.read_bytes() == other.read_bytes(), stage


@pytest.mark.long
def test_what_people_try_with_dvc(dvc_project: Project) -> None:
    project = dvc_project
    (project.folder / "artifacts/train_head/head.safetensors").unlink()
    assert project.ran(project.run("dvc", "repro")) == []  # restored from the cache
    assert (project.folder / "artifacts/train_head/head.safetensors").exists()

    output = project.run("dvc", "exp", "run", "-S", "train_full.cycles=2")
    # If the first of two cycles is the best, retraining gives the same weights, and there is nothing new to register.
    assert project.ran(output)[:3] == AFTER_FULL[:3]
    assert "train_full" in project.run("dvc", "metrics", "show")
    assert "train_full.cycles" in project.run("dvc", "exp", "show", "--csv")
    assert "train_full.cycles" in project.run("dvc", "params", "diff")

    apply_overrides(project.folder / "params.yaml", ["train_full.cycles=1"])
    assert project.ran(project.run("dvc", "repro")) == []  # found in the run cache
    assert "file:///" in project.run("dvc", "plots", "show", "-o", "plots")

    head = project.folder / "tasks/explore.py"
    head.write_text(head.read_text() + "\n# a change of this step's code\n")
    assert project.ran(project.run("dvc", "repro")) == ["explore"]
    assert project.ran(project.run("dvc", "repro", "--force", "--single-item", "explore")) == ["explore"]


@pytest.mark.long
def test_an_experiment_in_a_copy_is_recorded_where_the_workspace_is(dvc_project: Project) -> None:
    """DVC removes the copy. `dvc exp apply` then puts the experiment's `registration.json` into the workspace."""
    output = dvc_project.run("dvc", "exp", "run", "--temp", "--name", "in-a-copy", "-S", "register.model_name=other")
    assert dvc_project.ran(output)[-1] == "register"
    mlflow = dvc_project.mlflow
    version = mlflow.get_model_version("other", "1")
    assert mlflow.get_run(version.run_id).data.params["register.model_name"] == "other"
    assert str(dvc_project.folder / "mlruns") in mlflow.get_model_version_download_uri("other", "1")
    dvc_project.run("dvc", "exp", "apply", "in-a-copy")
    registered = json.loads((dvc_project.folder / "artifacts/register/registration.json").read_text())
    assert (registered["model"], registered["version"], registered["run"]) == ("other", 1, version.run_id)
    assert "up to date" in dvc_project.run("dvc", "status")


@pytest.mark.long
def test_a_changed_image_is_noticed_wherever_the_folder_lies(dvc_project: Project) -> None:
    photos = dvc_project.folder.parent / "photos"
    (photos / "dark/00.png").rename(photos / "bright/relabelled.png")
    assert "ingest" in dvc_project.run("dvc", "status")
    (photos / "bright/relabelled.png").rename(photos / "dark/00.png")
    assert "up to date" in dvc_project.run("dvc", "status")
    for change in (
        lambda: (photos / "dark/00.png").unlink(),
        lambda: Image.new("RGB", (40, 40)).save(photos / "dark/new.png"),
        lambda: Image.new("RGB", (40, 40), "red").save(photos / "dark/01.png"),
    ):
        change()
        assert dvc_project.ran(dvc_project.run("dvc", "repro", "ingest")) == ["ingest"]
