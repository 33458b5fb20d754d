"""The journal of what MLflow is to be told, on disks that are full and by processes that are killed."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tasks import publishing
from tasks.journal import Journal, is_being_written, read, waiting
from unfreeze.errors import UserError

HEAD = {"pass": "a/pass", "stage": "ingest"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_a_full_disk_does_not_take_is_written_when_there_is_space() -> None:
    journal = Journal(HEAD)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        for i in range(200):
            journal.write({"i": i})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 0 < len(list(read(journal.folder, 0))) < 200
    journal.write({"i": 200})
    assert [record["i"] for record, _ in read(journal.folder, 0)] == list(range(201))


def test_a_journal_is_held_until_it_is_closed_or_its_process_is_killed() -> None:
    journal = Journal(HEAD)
    assert is_being_written(journal.folder)
    journal.close()
    assert not is_being_written(journal.folder)
    code = f"import os, tasks.journal as j; j.Journal({HEAD}).write({{'i': 1}}); os.kill(os.getpid(), 9)"
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(root)}, check=False)
    first, second = waiting()
    assert first == journal.folder and not is_being_written(second)
    assert [record for record, _ in read(second, 0)] == [{"i": 1}]


def test_half_a_line_is_not_read() -> None:
    journal = Journal(HEAD)
    journal.write({"i": 1})
    with (journal.folder / "records.jsonl").open("a") as file:
        file.write('{"i": ')
    assert [record for record, _ in read(journal.folder, 0)] == [{"i": 1}]


def test_where_nothing_can_be_written_that_is_said_in_a_sentence() -> None:
    Path(".unfreeze").touch()
    with pytest.raises(UserError, match="cannot be written to .unfreeze/tracking"):
        Journal(HEAD)


def test_one_that_is_back_after_it_was_sent_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a loss of power, before which its removal had not got to the disk."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    head = {"pass": "a", "door": "flow", "stage": "ingest", "execution": "1", "address": publishing.address()}
    params: dict[str, dict[str, str]] = {"parent": {}, "child": {}}
    journal = Journal(head | {"experiment": "unfreeze", "name": "a", "when": 1, "params": params})
    journal.write(*({"run": run, "status": "FINISHED", "when": 2} for run in ("child", "parent")), {"closed": True})
    journal.close()
    client = publishing.client()
    for removes in (False, True):
        with monkeypatch.context() as patch:
            if not removes:
                patch.setattr(publishing, "remove", lambda folder: None)
            list(publishing.send(client))
        runs = client.search_runs([client.get_experiment_by_name("unfreeze").experiment_id])
        assert [run.info.status for run in runs] == ["FINISHED"] * 2 and bool(waiting()) != removes
