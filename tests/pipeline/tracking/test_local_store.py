"""MLflow's database and files belong to the workspace.

This also holds after the workspace was copied or moved, and in the copies that DVC makes of it.
"""

import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from pipeline.tracking import local_store, sender
from pipeline.tracking.journal import Journal, waiting
from pipeline.tracking.tracker import begin_journal
from unfreeze.errors import UserError

PARAMS = {"data.source": "photos", "backbone.name": "timm:resnet18", "data.image_size": 32}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with three runs: one with a file, and two without files."""
    folder = tmp_path_factory.mktemp("original")
    with pytest.MonkeyPatch.context() as patch:
        be_in(folder, patch)
        log("one", "a file")
        log("two")
        log("three")
    return folder


@pytest.fixture
def mlflow_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda folder: be_in(folder, monkeypatch)


def be_in(folder: Path, patch: pytest.MonkeyPatch, database: str = "") -> None:
    """Work in a folder. MLflow caches a connection for each address, so a database's address has its full path."""
    folder.mkdir(parents=True, exist_ok=True)
    patch.chdir(folder)
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database or quote(str(folder / 'mlflow.db'))}")
    patch.setenv("MLFLOW_EXPERIMENT_NAME", "team/a b")


def log(key: str, *files: str) -> None:
    """Record a pass with these files, and send it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNFREEZE_PASS", key)
        journal: Journal = begin_journal("", PARAMS, {})
    for name in files:
        Path(name).write_text(key)
        journal.write({"run": "parent", "file": journal.keep(Path(name)), "to": None})
    journal.write({"run": "parent", "status": "FINISHED", "when": 1}, {"closed": True})
    journal.close()
    list(sender.send(sender.client()))
    assert not waiting()


def where() -> dict[str, Path]:
    """Folders in which MLflow looks for the files of each pass, according to this folder's database."""
    client = sender.client()
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    found = {}
    for run in client.search_runs(ids):
        place = local_store.url2pathname(local_store.urlsplit(run.info.artifact_uri).path)
        found[run.data.tags[sender.PASS_TAG]] = Path(place)
    return found


@pytest.mark.parametrize(("name", "empty"), [("copy", "two"), ("a b%20c/copy #1", "three")])
def test_a_copied_workspace_writes_into_its_own_folder(
    original: Path, tmp_path: Path, mlflow_of: Any, name: str, empty: str
) -> None:
    before = {path: path.read_bytes() for path in original.rglob("*") if path.is_file()}
    shutil.copytree(original, tmp_path / name)
    mlflow_of(tmp_path / name)
    log("new", "a file")
    log(empty, "a file")
    found = where()
    assert all(place.is_relative_to(tmp_path / name / "mlruns") for place in found.values())
    for key in ("one", "new", empty):
        assert (found[key] / "a file").read_text() == key
    assert before == {path: path.read_bytes() for path in original.rglob("*") if path.is_file()}


def test_a_moved_workspace_finds_its_files(original: Path, tmp_path: Path, mlflow_of: Any) -> None:
    shutil.copytree(original, tmp_path / "first")
    mlflow_of(tmp_path / "first")
    sender.client()
    (tmp_path / "first").rename(tmp_path / "moved")
    mlflow_of(tmp_path / "moved")
    found = where()["one"]
    assert found.is_relative_to(tmp_path / "moved") and (found / "a file").read_text() == "one"


def test_files_that_were_not_copied_are_found_in_the_original(original: Path, tmp_path: Path, mlflow_of: Any) -> None:
    shutil.copy(original / "mlflow.db", tmp_path)
    mlflow_of(tmp_path)
    log("new", "a file")
    found = where()
    assert found["one"].is_relative_to(original) and (found["one"] / "a file").exists()
    assert found["new"].is_relative_to(tmp_path) and (found["new"] / "a file").exists()


def test_a_database_of_several_workspaces_is_left_as_it_is(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_in(tmp_path / "other", monkeypatch, str(original / "mlflow.db"))
    assert all(place.is_relative_to(original) for place in where().values())


def test_what_an_experiment_does_in_a_copy_of_dvcs_is_recorded_in_the_workspace(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(original / "mlflow.db", tmp_path / "of this test.db")
    for number, place in enumerate((".dvc/tmp/exps/tmp1", ".dvc/tmp/exps/standalone/tmp2/below")):
        be_in(tmp_path / place, monkeypatch, "of this test.db")
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "new")
        log(f"pass {number}", "a file")
        assert [path.name for path in (tmp_path / place).iterdir()] == ["a file"]
    be_in(tmp_path, monkeypatch)
    (tmp_path / "of this test.db").rename("mlflow.db")
    found = where()
    for key in ("pass 0", "pass 1"):
        assert found[key].is_relative_to(tmp_path / "mlruns/new") and (found[key] / "a file").read_text() == key
    assert (tmp_path / ".unfreeze/tracking").is_dir()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("localhost:5000", "Write http://localhost:5000 for a server"),
        ("./mlruns", "MLflow no longer stores runs in a folder"),
        ("file:///tmp/mlruns", "MLflow no longer stores runs in a folder"),
        ("mlflow.db", "sqlite:///mlflow.db for a file"),
        ("sqlite://mlflow.db", "three slashes"),
        ("htp://team:secret1@localhost:5000", "htp://***@localhost:5000, which is not a valid MLflow address"),
        ("http://", "it has no host"),
        ("http://localhost:50o0", "Port could not be cast"),
        ("postgresql://team@db/mlflow", "No module named 'psycopg"),
    ],
)
def test_what_is_no_address_of_mlflows_is_refused(monkeypatch: pytest.MonkeyPatch, address: str, said: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI is ") as caught:
        local_store.check_tracking_uri()
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "http://localhost:5000", "https://team:secret1@mlflow.org/here", "sqlite:///mlflow.db", "sqlite:////tmp/a b.db",
        "databricks", "databricks://profile",
    ],
)  # fmt: skip
def test_addresses_of_mlflows_are_taken(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    local_store.check_tracking_uri()


def test_files_of_a_database_elsewhere_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example on a worker: the workspace of a run is removed, and the database stays."""
    (tmp_path / "workspace").mkdir()
    monkeypatch.chdir(tmp_path / "workspace")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/home/mlflow.db")
    assert local_store.files_of("unfreeze") == (tmp_path / "home/mlruns/unfreeze").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    assert local_store.files_of("unfreeze") == (tmp_path / "workspace/mlruns/unfreeze").as_uri()
