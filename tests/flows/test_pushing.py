"""The outputs of a step are pushed to DVC's remote while DVC runs the next step."""

import subprocess
import threading
import time
from pathlib import Path

import pytest

from flows import dvc
from flows.pushing import Pushing
from pipeline import mirror
from pipeline.artifacts import write_json

COMMANDS = """
stages:
  ingest: {cmd: echo images > images, outs: [images]}
  train_full: {cmd: "touch begun; while [ ! -e end ]; do sleep 0.1; done; echo w > weights", deps: [images], outs: [weights]}
"""


@pytest.fixture(autouse=True)
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    subprocess.run(dvc.dvc("init", "--no-scm", "--quiet"), check=True)
    subprocess.run(dvc.dvc("remote", "add", "-q", "--default", "team", str(tmp_path / "remote")), check=True)
    Path("dvc.yaml").write_text(COMMANDS)


def pushed(tmp_path: Path) -> set[str]:
    return {file.read_text().strip() for file in (tmp_path / "remote/files").rglob("*") if file.is_file()}


def test_what_a_step_has_made_is_pushed_while_the_next_one_is_at_work(tmp_path: Path) -> None:
    list(dvc.reproduce("ingest", pull=False))
    next_one = threading.Thread(target=lambda: list(dvc.reproduce("train_full", pull=False)))
    next_one.start()
    while not Path("begun").exists():
        time.sleep(0.1)
    pushing = Pushing()
    pushing.after("ingest")
    assert pushing.wait() and pushed(tmp_path) == {"images"} and not dvc.to_push()
    assert next_one.is_alive()
    Path("end").touch()
    next_one.join()
    assert not dvc.stale_stages()


def test_a_push_that_fails_is_left_to_the_end_of_the_pass(tmp_path: Path) -> None:
    list(dvc.reproduce("ingest", pull=False))
    (tmp_path / "remote").write_text("no folder")
    pushing = Pushing()
    pushing.after("ingest")
    assert not pushing.wait() and dvc.to_push()
    (tmp_path / "remote").unlink()
    assert dvc.push() is None and pushed(tmp_path) == {"images"}


def test_checkpoints_are_shared_until_what_the_step_made_is_in_the_remote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses = {tmp_path / "shared/ingest/word": "ingest", tmp_path / "shared/train_full/word": "train_full"}
    for folder in addresses:
        folder.mkdir(parents=True)
    mirror.NOTE.parent.mkdir()
    write_json(mirror.NOTE, {str(folder): stage for folder, stage in addresses.items()})
    monkeypatch.setattr(dvc, "push", lambda pauses, beside: None)
    pushing = Pushing()
    pushing.after("ingest")
    assert pushing.wait()
    assert [folder.exists() for folder in addresses] == [False, True]
