"""Names of runs, and tags in MLflow for their provenance, with a real Git repository."""

import socket
import subprocess
from pathlib import Path

import pytest
import yaml

from pipeline.provenance import LONGEST, code_tags, description, differing_settings, title

PARAMS = {"seed": 42, "data": {"source": "../photos", "image_size": 160}, "backbone": {"name": "timm:resnet18"}}
FLAT = {"seed": 42, "data.source": "../photos", "data.image_size": 160, "backbone.name": "timm:resnet18"}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("tasks").mkdir()
    Path("tasks/explore.py").write_text("")
    Path("params.yaml").write_text(yaml.dump(PARAMS))
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "a"]):
        subprocess.run(["git", *words], check=True)
    return tmp_path


def test_a_run_is_called_by_what_differs_from_the_commit(checkout: Path) -> None:
    assert title(FLAT) == "photos · resnet18 · 160 px"
    changed = FLAT | {"seed": 7, "data.image_size": 224}
    assert differing_settings(changed) == {"seed": 7, "data.image_size": 224}
    assert title(changed) == "photos · resnet18 · 224 px · seed=7"
    many = {f"train.knob_{i}": i for i in range(100)}
    for long in ({}, {"backbone.name": "timm:" + "x" * 300}, {"data.source": "/srv/" + "y" * 240}):
        assert len(title(FLAT | many | long)) == LONGEST
    assert len(f"{'x' * LONGEST} · 27 Nov 23:59") <= 250  # the limit of MLflow's PostgreSQL


def test_settings_make_no_code_changed_and_a_new_module_does(checkout: Path) -> None:
    Path("params.yaml").write_text(yaml.dump(PARAMS | {"seed": 7}))
    Path("dvc.lock").touch()
    assert code_tags()["unfreeze.changed"] == "no"
    Path("tasks/mine.py").touch()
    assert code_tags()["unfreeze.changed"] == "yes"


def test_the_description_says_where_a_run_was_and_masks_secrets(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEAM_TOKEN", "sesame-open")
    text = description(FLAT | {"backbone.weights": "https://host/sesame-open"}, "http://prefect/runs/flow-run/1")
    assert socket.gethostname() in text and "http://prefect/runs/flow-run/1" in text
    assert "backbone.weights=https://host/***" in text and "sesame" not in text


def test_without_a_commit_nothing_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert title(FLAT) == "photos · resnet18 · 160 px" and code_tags() == {}


def test_the_commit_is_known_in_a_clone_of_somebody_elses(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example in a container that runs as root, with a folder of the host."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # a variable for Git's own tests
    refused = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    assert "dubious ownership" in refused.stderr
    assert code_tags() == {"mlflow.source.git.commit": commit, "unfreeze.changed": "no"}
