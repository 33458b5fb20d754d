"""What the tracker tells MLflow of the code that ran."""

import subprocess
from pathlib import Path

import pytest

from pipeline.tracking.tracker import _source_tags


def test_the_commit_is_known_in_a_clone_of_somebody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container, to whose superuser a folder of the host's is given."""
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "--quiet"], check=True)
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *author, "commit", "--quiet", "--allow-empty", "--message", "a"], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # Git's own, for its tests
    refused = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    assert "dubious ownership" in refused.stderr
    assert _source_tags() == {"mlflow.source.git.commit": commit, "unfreeze.changed": "no"}
