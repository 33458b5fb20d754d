"""Workspaces of deployed runs, with a real Git repository and a real DVC."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from flows import dvc, workspace
from flows.workspace import LOCK, fetch, forget_old, furnish, is_shared, is_workspace, leave, make, settings_key
from pipeline.process.environment import home
from pipeline.process.lock import hold
from pipeline.tracking.journal import ROOT
from unfreeze.errors import UserError


@pytest.fixture
def origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A repository with one commit. The process acts as a worker with a separate home."""
    for name in ("UNFREEZE_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name in (LOCK, "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(workspace, "PAUSES", (0,))
    monkeypatch.chdir(tmp_path)
    origin = tmp_path / "origin"
    subprocess.run(["git", "init", "-q", "-b", "main", origin], check=True)
    (origin / ".dvc").mkdir()
    (origin / ".dvc/config").touch()
    commit(origin, "one")
    yield origin
    if LOCK in os.environ:
        os.close(int(os.environ[LOCK]))


def commit(folder: Path, text: str) -> str:
    (folder / "code.txt").write_text(text)
    for words in (["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", text]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def begin(origin: Path, **parameters: object) -> Path:
    """Prepare a workspace, as a run does first. The previous run, if any, has ended."""
    if LOCK in os.environ:
        os.close(int(os.environ.pop(LOCK)))
    newest = fetch(str(origin), "main")
    return make(str(origin), newest, f"{newest[:12]}-{settings_key(parameters)}")


def test_a_run_starts_from_the_newest_commit(origin: Path) -> None:
    assert (begin(origin) / "code.txt").read_text() == "one"
    (origin / "code.txt").write_text("not committed")
    assert (begin(origin) / "code.txt").read_text() == "one"
    commit(origin, "two")
    folder = begin(origin)
    assert (folder / "code.txt").read_text() == "two"
    assert is_workspace(folder) and not is_workspace(origin)


def test_an_interrupted_run_is_found_again_by_what_it_computes(origin: Path) -> None:
    first = begin(origin, settings={"seed": 7}, settings_file=None)
    (first / "checkpoint").touch()
    assert begin(origin, settings={"seed": 8}) != first
    assert begin(origin, settings={}, settings_file=None) == begin(origin) != first
    assert (begin(origin, settings_file=None, settings={"seed": 7}) / "checkpoint").exists()


def test_a_finished_run_leaves_nothing_unless_another_is_in_its_workspace(origin: Path) -> None:
    folder = begin(origin)
    with hold(folder.with_name(f"{folder.name}.lock"), shared=True):  # as if another process held the lock
        assert is_shared()
        leave(folder)
        assert folder.exists()
    assert not is_shared()
    leave(folder)
    assert list(folder.parent.iterdir()) == []


def test_what_was_interrupted_is_removed_when_nobody_came_back(origin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = begin(origin, settings={"seed": 1})
    mine = begin(origin, settings={"seed": 2})
    forget_old()
    assert old.exists()
    monkeypatch.setattr(workspace, "FORGET", -1)
    forget_old()
    assert not old.exists() and mine.exists()


def test_what_outlives_a_workspace_is_shared(origin: Path, tmp_path: Path) -> None:
    image, listed = tmp_path / "image", []
    stage = {"cmd": "touch made", "deps": [str(image)], "outs": ["made"]}
    (origin / "dvc.yaml").write_text(yaml.dump({"stages": {"see": stage}}))
    commit(origin, "stage")
    first, second = begin(origin, settings={"seed": 1}), begin(origin, settings={"seed": 2})
    for folder in (first, second, second):
        furnish(folder)
    (first / ROOT / "waits").touch()
    (first / dvc.TO_PUSH).touch()
    assert (second / ROOT / "waits").exists() and (second / dvc.TO_PUSH).exists()
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{home()}/mlflow.db"
    # DVC does not hash an image again if its size and time are unchanged. Here only the content changes.
    for folder, content in ((first, b"12"), (second, b"34")):
        image.write_bytes(content)
        os.utime(image, (1e9, 1e9))
        subprocess.run(dvc.dvc("repro", "-q"), cwd=folder, check=True)
        listed.append((folder / "dvc.lock").read_text())
    assert listed[0] == listed[1]
    assert {folder.name for folder in (home() / "cache").iterdir()} >= {"files", "runs"}
    # The next run with the same settings finds everything in place.
    leave(second)
    commit(origin, "two")
    third = begin(origin, settings={"seed": 2})
    furnish(third)
    assert (third / "made").exists() and (third / "dvc.lock").read_text() == listed[1]


def test_a_branch_that_cannot_be_fetched_is_a_sentence(origin: Path) -> None:
    with pytest.raises(
        UserError, match=r"runs the branch nobody of .*origin, which cannot be fetched: .*Was it pushed"
    ):
        fetch(str(origin), "nobody")
    with pytest.raises(UserError, match="cannot be fetched"):
        fetch(str(origin / "nowhere"), "main")
