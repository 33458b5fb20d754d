"""The journal of records for MLflow, with full disks and killed processes."""

import os
import resource
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.publish import publish, what_waits
from pipeline.tracking import sender
from pipeline.tracking.journal import Journal, is_being_written, read, waiting
from pipeline.tracking.tracker import Tracker
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
    code = f"import os, pipeline.tracking.journal as j; j.Journal({HEAD}).write({{'i': 1}}); os.kill(os.getpid(), 9)"
    root = Path(__file__).parent.parent.parent.parent
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


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Header of a step's journal, and a local MLflow to send the journal to."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    head = {"pass": "a", "door": "flow", "stage": "ingest", "execution": "1", "address": sender.address()}
    return head | {"experiment": "unfreeze", "name": "a", "when": 1, "params": {"parent": {}, "child": {}}}


def ended(head: dict[str, Any], *runs: str) -> None:
    """Write a journal that contains only the end of its runs."""
    journal = Journal(head)
    journal.write(*({"run": run, "status": "FINISHED", "when": 2} for run in runs), {"closed": True})
    journal.close()


def statuses(client: Any) -> list[str]:
    runs = client.search_runs([client.get_experiment_by_name("unfreeze").experiment_id])
    return [run.info.status for run in runs]


def test_one_that_is_back_after_it_was_sent_changes_nothing(
    head: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example after a power loss, if the journal's removal had not reached the disk."""
    ended(head | {"description": "On a host."}, "child", "parent")
    client = sender.client()
    for removes in (False, True):
        with monkeypatch.context() as patch:
            if not removes:
                patch.setattr(sender, "remove", lambda folder: None)
            list(sender.send(client))
        assert statuses(client) == ["FINISHED"] * 2 and bool(waiting()) != removes
    experiment = client.get_experiment_by_name("unfreeze")
    notes = [run.data.tags.get("mlflow.note.content") for run in client.search_runs([experiment.experiment_id])]
    assert notes.count("On a host.") == 1  # only in the parent run


def test_killed_while_the_end_of_a_pass_is_sent_nothing_seems_to_run(head: dict[str, Any]) -> None:
    """The next command may be `dvc repro` with nothing to do, which sends nothing."""
    ended(head, "child", "parent")
    client = sender.client()
    list(sender.send(client))
    ended(head | {"stage": ""}, "parent")
    requests = 0
    for _ in sender.send(client):
        assert statuses(client) == ["FINISHED"] * 2
        requests += 1
    assert requests > 4 and not waiting()


def test_a_deleted_experiment_holds_up_no_other(head: dict[str, Any]) -> None:
    client = sender.client()
    gone = client.create_experiment("gone")
    client.delete_experiment(gone)
    ended(head | {"experiment": "gone"}, "parent")
    ended(head | {"pass": "b"}, "child", "parent")
    with pytest.raises(sender.Unreachable, match="experiment gone was deleted.*restore --experiment-id") as caught:
        list(sender.send(client))
    assert sender.reason(caught.value) == str(caught.value)
    assert statuses(client) == ["FINISHED"] * 2 and len(waiting()) == 1
    own = Journal(head | {"pass": "c"})
    list(sender.send(client, own))  # a step sends its own records despite those that an earlier step has left
    assert len(waiting()) == 2
    client.restore_experiment(gone)
    own.close()
    list(sender.send(client))
    assert not waiting()


def test_a_run_that_the_database_refuses_holds_up_no_other(head: dict[str, Any]) -> None:
    """PostgreSQL refuses a name of more than 250 characters. SQLite does not, so a trigger refuses it here."""
    client = sender.client()
    client.search_experiments()
    with sqlite3.connect(os.environ["MLFLOW_TRACKING_URI"].removeprefix("sqlite:///")) as database:
        database.execute(
            "CREATE TRIGGER long BEFORE INSERT ON runs WHEN length(NEW.name) > 250 "
            "BEGIN SELECT RAISE(ABORT, 'value too long'); END"
        )
    ended(head | {"name": "n" * 251}, "parent")
    ended(head | {"pass": "b"}, "child", "parent")
    with pytest.raises(sender.Unreachable, match="does not accept the run 'nnn.*its records are kept in"):
        list(sender.send(client))
    assert statuses(client) == ["FINISHED"] * 2 and len(waiting()) == 1
    own = Journal(head | {"pass": "c"})
    list(sender.send(client, own))
    assert len(waiting()) == 2
    own.close()


def test_an_experiment_that_is_deleted_meanwhile_lacks_nothing_when_it_is_restored(head: dict[str, Any]) -> None:
    journal, client = Journal(head), sender.client()
    journal.write({"run": "child", "metrics": {"loss": 1.0}, "at": 0, "when": 1})
    list(sender.send(client, journal))
    experiment = client.get_experiment_by_name("unfreeze")
    client.delete_experiment(experiment.experiment_id)
    journal.write({"run": "child", "metrics": {"loss": 0.5}, "at": 1, "when": 2})
    with pytest.raises(sender.Unreachable, match="experiment unfreeze was deleted"):
        list(sender.send(client, journal))
    client.restore_experiment(experiment.experiment_id)
    list(sender.send(client, journal))
    [child] = [run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name == "ingest"]
    assert [point.step for point in client.get_metric_history(child.info.run_id, "loss")] == [0, 1]


def test_a_damaged_database_is_told_in_a_sentence(head: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    ended(head, "child", "parent")
    Path(os.environ["MLFLOW_TRACKING_URI"].removeprefix("sqlite:///")).write_text("no database" * 500)
    assert publish(anyway=False) == 1
    assert "mlflow.db does not answer (" in capsys.readouterr().err and len(waiting()) == 1


def test_a_database_of_another_version_is_told_with_what_to_do(
    head: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(head, "child", "parent")
    list(sender.send(sender.client()))
    ended(head | {"pass": "b"}, "parent")
    file = os.environ["MLFLOW_TRACKING_URI"].removeprefix("sqlite:///")
    address = f"sqlite:///{shutil.copy(file, f'{file}.other')}"  # not opened before by this process
    with sqlite3.connect(address.removeprefix("sqlite:///")) as database:
        database.execute("UPDATE alembic_version SET version_num = 'acf3f17fdcc7'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert publish(anyway=True) == 1
    said = capsys.readouterr().err
    assert f"run `mlflow db upgrade {address}`" in said and "does not answer" not in said and len(waiting()) == 1


def test_a_run_that_is_deleted_meanwhile_is_taken_up_by_a_new_one(head: dict[str, Any]) -> None:
    """A user deletes runs in MLflow while a pass is running."""
    client = sender.client()
    journal = Journal(head)
    list(sender.send(client, journal))
    experiment = client.get_experiment_by_name("unfreeze").experiment_id
    for run in client.search_runs([experiment]):
        client.delete_run(run.info.run_id)
    journal.write({"run": "child", "metrics": {"loss": 1.0}, "at": 0, "when": 1}, {"closed": True})
    journal.close()
    list(sender.send(client))  # records that are only for the deleted run are dropped, and block nothing
    ended(head | {"stage": "explore", "execution": "2"}, "child", "parent")
    list(sender.send(client))
    assert statuses(client) == ["FINISHED"] * 2 and not waiting()


def test_what_waits_is_said_with_what_sends_it(head: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ended(head, "parent", "child")
    here = what_waits()
    assert here.startswith("1 record of a step not yet sent to MLflow at sqlite:///") and "mlflow.db. " in here
    assert "so does the next run" in here
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    elsewhere = what_waits()
    assert elsewhere.startswith("1 record of a step waits for MLflow at sqlite:///") and "--anyway" in elsewhere
    assert "next run" not in elsewhere and not sender.waiting_here() and len(waiting()) == 1


def left(head: dict[str, Any], *records: dict[str, Any]) -> Path:
    """The journal of a step that was killed."""
    journal = Journal(head)
    journal.write(*records)
    journal.close()  # without the closing record
    return journal.folder


def runs(client: Any) -> dict[str, tuple[str, str]]:
    """Status and owner of each run, by name."""
    found = client.search_runs([client.get_experiment_by_name("unfreeze").experiment_id])
    return {run.info.run_name: (run.info.status, run.data.tags["unfreeze.owner"]) for run in found}


def test_a_worker_that_comes_back_leaves_a_run_alone_that_another_one_has_taken(
    head: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, next_one = head | {"owner": "1@lost"}, head | {"owner": "2@next", "execution": "2", "stage": "train_full"}
    client = sender.client()
    being_written = Journal(lost)
    list(sender.send(client, being_written))
    assert runs(client) == {"a": ("RUNNING", "1@lost"), "ingest": ("RUNNING", "1@lost")}

    (tmp_path / "next").mkdir()
    monkeypatch.chdir(tmp_path / "next")
    ended(next_one, "child", "parent")
    list(sender.send(client))
    taken = {"a": ("FINISHED", "2@next"), "ingest": ("KILLED", "1@lost"), "train_full": ("FINISHED", "2@next")}
    assert runs(client) == taken

    monkeypatch.chdir(tmp_path)
    being_written.write(
        {"run": "parent", "metrics": {"ingest/images": 1.0}, "at": 0, "when": 2},
        {"run": "parent", "tag": ["unfreeze.data", "lost"]},
        {"run": "parent", "status": "FAILED", "when": 3},
    )
    being_written.close()  # the step is killed
    left(lost | {"execution": "3", "stage": "explore"})  # this run is unknown to the server
    list(sender.send(client))
    assert not waiting() and runs(client) == taken | {"explore": ("KILLED", "1@lost")}
    [parent] = [run for run in client.search_runs(["1"]) if run.info.run_name == "a"]
    assert not parent.data.metrics and "unfreeze.data" not in parent.data.tags


def test_the_next_worker_takes_a_run_that_its_last_one_has_ended(head: dict[str, Any]) -> None:
    """A worker that is stopped normally ends its run."""
    client = sender.client()
    left(head | {"owner": "1@lost"})
    list(sender.send(client))
    assert runs(client)["a"] == ("KILLED", "1@lost")
    journal = Journal(head | {"owner": "2@next", "execution": "2"})
    list(sender.send(client, journal))
    assert runs(client)["a"] == ("RUNNING", "2@next")


def test_no_model_is_logged_to_a_run_that_another_worker_has_taken(
    head: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"UNFREEZE_PASS": "a", "UNFREEZE_OWNER": "1@lost", "MLFLOW_EXPERIMENT_NAME": "unfreeze"}.items():
        monkeypatch.setenv(name, value)
    tracker = Tracker("register", {"data.source": "photos", "backbone.name": "timm:a", "data.image_size": 32}, {})
    parent = tracker.parent()
    sender.client().set_tag(parent, "unfreeze.owner", "2@next")
    with pytest.raises(UserError, match="Another worker has taken over this run"):
        tracker.parent()
    tracker.close("KILLED", {}, 0.0)
    assert sender.client().get_run(parent).info.status == "RUNNING"
