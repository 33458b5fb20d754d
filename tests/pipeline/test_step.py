"""Errors and changes of inputs while a step is running, and messages of the commands about errors outside of steps."""

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.cli import main
from flows.prefect_logs import shorten
from pipeline.artifacts import artifact
from pipeline.exit_codes import USER_ERROR, WORTH_A_RETRY
from pipeline.process import lock
from pipeline.step import Run, Step
from tasks import ingest
from tests.integration.project import SMALL, paint
from unfreeze.data.packing import pack
from unfreeze.errors import UserError
from unfreeze.settings.overrides import apply_overrides

ROOT = Path(__file__).parent.parent.parent
AT_WORK = (
    "from pipeline.process.lock import alone\nimport time\nwith alone('step'): print('in', flush=True); time.sleep(60)"
)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace with a few photographs, without DVC."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, name)
    shutil.copytree(ROOT / "tasks", "tasks", ignore=shutil.ignore_patterns("__pycache__"))
    apply_overrides("params.yaml", [f"{key}={value}" for key, value in SMALL.items()])
    paint(Path("../photos"), 0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "unfreeze")
    monkeypatch.setenv("UNFREEZE_PASS", "one")


def ended(step: Step, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and error output of a step."""
    code: Any = 0
    try:
        step.main()
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().err


def edit(text: str) -> None:
    Path("tasks/explore.py").write_text(text)


@pytest.mark.parametrize(
    ("meanwhile", "matters"),
    [
        (lambda: apply_overrides("params.yaml", ["data.test=0.4"]), True),
        (lambda: apply_overrides("params.yaml", ["train_full.cycles=7"]), False),
        (lambda: edit("# other code"), True),
    ],
    ids=["a setting", "another step's setting", "code"],
)
def test_what_changes_while_a_step_is_at_work_is_not_noted_as_what_it_read(
    capsys: pytest.CaptureFixture[str], meanwhile: Callable[[], None], matters: bool
) -> None:
    def work(run: Run, data: object) -> Mapping[str, float]:
        meanwhile()
        return {"images": 3}

    code, said = ended(Step("explore", work, ("data",)), capsys)
    assert code == (USER_ERROR if matters else 0)
    assert ("explore: Its settings, code or inputs changed" in said) == matters
    assert artifact("explore", "metrics.json").exists() != matters
    assert ended(Step("explore", lambda run, data: {"images": 3}, ("data",)), capsys)[0] == 0


def test_images_that_go_while_they_are_read_are_not_called_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(*arguments: Any) -> dict[str, float]:
        for file in Path("../photos/dark").iterdir():
            file.unlink()
        return pack(*arguments)

    monkeypatch.setattr(sys.modules["tasks.ingest"], "pack", meanwhile)
    code, said = ended(ingest.ingest, capsys)
    assert code == WORTH_A_RETRY and "../photos were added, changed or removed" in said


@pytest.mark.parametrize("what", ["more", "fewer", "another"])
def test_images_that_come_and_go_while_they_are_read_are_not_taken_for_those_that_were(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def meanwhile(*arguments: Any) -> dict[str, float]:
        found = pack(*arguments)
        first = Path("../photos/dark/00.png")
        if what == "fewer":
            first.unlink()
        else:
            shutil.copy("../photos/bright/03.png", first.with_name("new.png") if what == "more" else first)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["tasks.ingest"], "pack", meanwhile)
        code, said = ended(ingest.ingest, capsys)
    assert code == WORTH_A_RETRY and "../photos were added, changed or removed" in said
    assert not artifact("ingest", "metrics.json").exists()
    assert ended(ingest.ingest, capsys)[0] == 0


def test_memory_that_runs_out_is_told_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    def work(run: Run) -> Mapping[str, float]:
        return {"sum": float(torch.ones(2**50).sum())}

    def refused(run: Run) -> Mapping[str, float]:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    for lacking in (work, refused):
        code, said = ended(Step("explore", lacking, ()), capsys)
        assert code == WORTH_A_RETRY and said.startswith("explore: Memory ran out. A smaller batch_size (such as 16)")


def test_another_error_is_not_taken_for_it() -> None:
    def work(run: Run) -> Mapping[str, float]:
        return {"product": float((torch.ones(2, 3) @ torch.ones(2, 3)).sum())}

    with pytest.raises(RuntimeError, match="shapes"):
        Step("explore", work, ()).main()


def test_settings_are_not_changed_under_a_step_of_the_other_door(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Path("params.yaml").read_bytes()
    monkeypatch.setattr("pipeline.process.signals.GRACE", 0.5)
    monkeypatch.setattr("pipeline.process.orphans.leave_none", lambda: None)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", AT_WORK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as step:
        assert step.stdout is not None and step.stdout.readline() == "in\n"
        assert main(["run", "-S", "seed=7"]) == USER_ERROR
        assert capsys.readouterr().err.startswith(
            f"unfreeze: Another step is at work in {Path.cwd()} (process {step.pid})"
        )
        step.kill()
    assert Path("params.yaml").read_bytes() == before


def test_a_step_waits_for_one_that_is_about_to_end() -> None:
    code = AT_WORK.replace("60", "1")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as step:
        assert step.stdout is not None and step.stdout.readline() == "in\n"
        Step("explore", lambda run: {"images": 3}, ()).main()
        assert step.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_as_soon_as_it_begins_says_so(number: int) -> None:
    command = [sys.executable, "-m", "flows.cli", "run"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as run:
        until = time.monotonic() + 120  # long, because the machine may be busy
        while not (begun := Path(".unfreeze/run.lock").exists()) and time.monotonic() < until:
            time.sleep(0.05)
        run.send_signal(number)
        _, said = run.communicate(timeout=60)
    assert begun and said == "unfreeze: stopped. `unfreeze run` continues where it stopped.\n"
    # If the signal arrives during an `exec` of source text, for example while a dataclass is created, SIGINT ends
    # `python -m` although its exception was caught. A shell reports 130 for both return codes.
    assert run.returncode in (130, -signal.SIGINT)


def test_what_the_disk_does_not_allow_outside_of_steps_is_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(lock, "FOLDER", Path("/sys/unfreeze"))  # where not even root can create a folder
    monkeypatch.setattr("pipeline.process.orphans.leave_none", lambda: None)
    assert main(["run"]) == USER_ERROR
    said = capsys.readouterr().err
    assert said.startswith("unfreeze: /sys/unfreeze: ") and "See who may read and write there" in said
    assert main(["predict", "x" * 300]) == USER_ERROR
    assert f"{'x' * 300} does not exist" in capsys.readouterr().err
    assert main(["predict", "../photos/dark/00.png", "--model", "x" * 300]) == USER_ERROR
    assert "There are no weights at xxx" in capsys.readouterr().err


def test_a_deployments_log_says_why_and_not_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(error: Exception, message: str) -> tuple[bool, str, bool]:
        record = logging.LogRecord("prefect.flow_runs", logging.ERROR, "", 0, message, (), (type(error), error, None))
        keeps = shorten(record)
        return keeps, record.getMessage(), bool(record.exc_info)

    wrong, strange = UserError("seed is 1.5, but must be a whole number."), ValueError("no sentence")
    assert not kept(wrong, "Encountered exception during execution: ...")[0]
    assert kept(strange, "Encountered ...") == (True, "Encountered ...", True)
    assert not kept(OSError(errno.ENOSPC, "No space left on device"), "Encountered ...")[0]
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "1")
    assert kept(wrong, "Encountered exception during execution: ...") == (True, str(wrong), False)
