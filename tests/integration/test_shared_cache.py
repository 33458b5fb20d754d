"""Two workspaces on one DVC cache, as for two users of one machine."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.project import Project
from unfreeze.settings.overrides import apply_overrides

pytestmark = pytest.mark.long

UPTO = "ingest"  # its split depends on the seed


def split(project: Project) -> bytes:
    return (project.folder / "artifacts/ingest/images.csv").read_bytes()


def test_two_workspaces_at_once_on_one_cache_are_both_right(
    make_project: Callable[[], Project], tmp_path: Path
) -> None:
    one, other = make_project(), make_project()
    for project in (one, other):
        project.run("dvc", "cache", "dir", "--local", str(tmp_path / "cache"))
    running = [
        subprocess.Popen([sys.executable, "-m", "dvc", "repro", UPTO], cwd=p.folder, env=p.environment)
        for p in (one, other)
    ]
    assert [process.wait(400) for process in running] == [0, 0]
    first = split(one)
    assert first and split(other) == first

    # One workspace changes its settings. The other one is not affected and loses nothing.
    apply_overrides(one.folder / "params.yaml", ["seed=7"])
    one.run("dvc", "repro", UPTO)
    second = split(one)
    assert second != first and split(other) == first
    shutil.rmtree(other.folder / "artifacts")
    other.run("dvc", "checkout", "--allow-missing")
    assert split(other) == first

    # Outputs that one workspace has computed are cache hits in the other one.
    apply_overrides(other.folder / "params.yaml", ["seed=7"])
    assert other.ran(other.run("dvc", "repro", UPTO)) == []
    assert split(other) == second
    for project in (one, other):
        assert "up to date" in project.run("dvc", "status", UPTO)
