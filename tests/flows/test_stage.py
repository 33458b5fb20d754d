"""Error message of a flow for a failed step, taken from DVC's output."""

import subprocess
from pathlib import Path

import pytest
from prefect.logging import disable_run_logger

from flows import dvc, stage
from pipeline.exit_codes import USER_ERROR

COMMANDS = f"""
stages:
  ingest: {{cmd: kill -KILL $$, outs: [a]}}
  explore: {{cmd: echo the reason; exit 1, outs: [b]}}
  evaluate: {{cmd: echo done > d, deps: [images], outs: [d]}}
  precompute: {{cmd: echo what to mend; exit {USER_ERROR}, outs: [c]}}
"""


@pytest.fixture(autouse=True)
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNFREEZE_PASS", "this one")
    subprocess.run(dvc.dvc("init", "--no-scm", "--quiet"), check=True)
    Path("dvc.yaml").write_text(COMMANDS)
    Path("images").touch()


def test_why_a_step_failed_is_said_and_whether_it_is_worth_a_retry() -> None:
    for name, said, retry in [
        ("ingest", stage.KILLED, True),
        ("explore", "the reason", True),
        ("precompute", "what to mend", False),
    ]:
        with disable_run_logger(), pytest.raises(stage.StageFailed, match=f"The step {name} failed") as caught:
            stage._run(name, pull=False)
        assert said in str(caught.value).splitlines() and caught.value.retry == retry


def test_what_was_to_be_pushed_to_a_remote_that_is_no_more_waits_no_longer() -> None:
    dvc.TO_PUSH.parent.mkdir(parents=True)
    dvc.TO_PUSH.touch()
    assert dvc.push(pauses=()) is None and not dvc.to_push()


def test_dvc_killed_while_it_notes_a_run_is_asked_again() -> None:
    """DVC has created the folder of an entry in its run cache, but has not yet written the entry."""
    list(dvc.reproduce("evaluate", pull=False))
    (note,) = Path(".dvc/cache/runs").glob("??/*/*")
    note.unlink()
    Path("dvc.lock").unlink()
    failed = subprocess.run(dvc.dvc("repro", "evaluate"), capture_output=True, text=True)
    assert failed.returncode and "not 'NoneType'" in failed.stderr  # DVC does not recover by itself
    said = list(dvc.reproduce("evaluate", pull=False))
    assert any(str(note.parent) in line for line in said)
    assert note.exists() and Path("d").read_text() == "done\n"
