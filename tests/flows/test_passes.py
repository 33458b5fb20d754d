"""A pass with nothing to do is recognised without starting Prefect."""

import os
from pathlib import Path

import pytest

from flows import dvc, passes
from flows.prefect_server import SAME_PASS
from pipeline.artifacts import STAGES
from pipeline.tracking.journal import Journal


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace in which every step has run, and in which DVC finds nothing changed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    (tmp_path / "params.yaml").write_text((Path(passes.__file__).parent.parent / "params.yaml").read_text())
    for stage in STAGES:
        (tmp_path / "artifacts" / stage).mkdir(parents=True)
        (tmp_path / "artifacts" / stage / "metrics.json").write_text("{}")
    monkeypatch.setattr(dvc, "stale_stages", set)
    return tmp_path


def test_nothing_to_do(finished: Path) -> None:
    outcomes = passes.up_to_date("train_head")
    assert list(outcomes) == list(STAGES[:5]) and not any(outcome.ran for outcome in outcomes.values())


@pytest.mark.parametrize("what", ["a stale step", "a step that never ran", "a push", "a record", "the same pass"])
def test_something_to_do(finished: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    if what == "a stale step":
        monkeypatch.setattr(dvc, "stale_stages", lambda: {"evaluate"})
    elif what == "a step that never ran":
        (finished / "artifacts/register/metrics.json").unlink()
    elif what == "a push":
        dvc.TO_PUSH.parent.mkdir(parents=True)
        dvc.TO_PUSH.touch()
    elif what == "a record":
        Journal({"pass": "flow-1", "stage": "ingest", "address": "sqlite:///mlflow.db"})
    else:
        monkeypatch.setitem(os.environ, SAME_PASS, "flow-1")
    assert passes.up_to_date("register") == {}


def test_a_later_step_does_not_matter(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dvc, "stale_stages", lambda: {"evaluate"})
    assert list(passes.up_to_date("train_full")) == list(STAGES[:8])
