"""Steps that are stopped early, identities of processes, and one run at a time."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from pipeline.process.lock import alone
from pipeline.process.signals import alive, dvc_above, identity
from pipeline.step import Run, Step
from unfreeze.errors import UserError
from unfreeze.persistence.interruption import Interrupted

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_an_identity_is_of_one_process_only() -> None:
    with subprocess.Popen(SLEEP) as process:
        word = identity(psutil.Process(process.pid))
        assert alive(word)
        assert not alive(word.replace("-", "-1"))
        process.kill()
        deadline = time.monotonic() + 5
        while alive(word) and time.monotonic() < deadline:  # dead, but its parent has not waited for it yet
            time.sleep(0.01)
        assert not alive(word)
    assert not alive(word)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the time of a start is kept as it was")
def test_a_clock_that_is_set_makes_no_other_process_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel counts start times from the boot. The boot's time of day changes with the clock."""
    before, word = psutil.Process().create_time(), identity(psutil.Process())
    booted = psutil.boot_time()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: booted + 1.0)
    assert psutil.Process().create_time() == pytest.approx(before + 1, rel=0, abs=0.1)
    assert identity(psutil.Process()) == word and alive(word)


def test_a_process_dies_softly_with_whom_it_works_for() -> None:
    with subprocess.Popen(SLEEP) as master:
        code = (
            "import signal, sys, time\nfrom pipeline.process.signals import die_with\n"
            "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
            "die_with([sys.argv[1]]); print('ready', flush=True); time.sleep(60)"
        )
        word = identity(psutil.Process(master.pid))
        with subprocess.Popen([sys.executable, "-c", code, word], stdout=subprocess.PIPE, text=True) as servant:
            assert servant.stdout is not None
            assert servant.stdout.readline() == "ready\n"
            assert servant.poll() is None
            master.kill()
            assert servant.wait(20) == 7


TRAINING = """
import sys, time
from pipeline.process.signals import stop_when_asked
from unfreeze.persistence.interruption import Interrupted, Interruption
wish = Interruption(deferred=sys.argv[1] == "training")
stop_when_asked(wish)
try:
    print("ready", flush=True)
    end = time.monotonic() + 30
    while time.monotonic() < end and not wish.asked:
        time.sleep(0.01)
    print("after its batch", flush=True)
    time.sleep(30)
except Interrupted:
    print("at once", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("what", "said"), [("training", ["after its batch", "at once"]), ("reading", ["at once"])])
def test_a_training_ends_after_its_batch_and_all_else_at_once(number: int, what: str, said: list[str]) -> None:
    with subprocess.Popen([sys.executable, "-c", TRAINING, what], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for words in said:  # the second signal does not wait for the training's batch
            process.send_signal(number)
            assert process.stdout.readline() == words + "\n"


def test_one_run_at_a_time_in_a_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "from pipeline.process.lock import alone\nimport time\nwith alone('run'): print('in', flush=True); time.sleep(60)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent.parent)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "in\n"
        with pytest.raises(UserError, match=rf"Another run is at work in .*process {first.pid}"), alone("run"):
            pass
        with alone("step"):  # another lock is still free
            pass
        first.kill()
        first.wait()
    with alone("run"), alone("run"):
        pass


def test_a_parent_that_may_not_be_looked_at_is_no_dvc(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(process: psutil.Process) -> list[str]:  # another user's process, hidden by /proc
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "cmdline", hidden)
    assert dvc_above() is None


def test_mlflow_knows_a_step_that_was_stopped_from_one_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(Path(__file__).parent.parent.parent.parent / name, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "unfreeze")
    monkeypatch.setenv("UNFREEZE_PASS", "one")

    def stopped(run: Run) -> dict[str, float]:
        raise Interrupted

    def failing(run: Run) -> dict[str, float]:
        raise UserError("no")

    for name, work in (("ingest", stopped), ("explore", failing), ("precompute", lambda run: {"features": 3.0})):
        with contextlib.suppress(SystemExit):
            Step(name, work, ()).main()
    mlflow = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = mlflow.search_runs([mlflow.get_experiment_by_name("unfreeze").experiment_id])
    found = {run.info.run_name: run.info.status for run in runs if "mlflow.parentRunId" in run.data.tags}
    assert found == {"ingest": "KILLED", "explore": "FAILED", "precompute": "FINISHED"}
