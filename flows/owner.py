"""A deployed flow run belongs to the worker that started it last.

If a worker is lost, Prefect's automation (`flows/automations.py`) schedules its flow run again. The next worker starts
the run, and the server increases the run's `run_count`. If the first worker had only lost its connection, it detects
this here and stops. It does not change the run's state in Prefect or MLflow, because the run has a new owner.
"""

import contextlib
import os
import threading
import time
from uuid import UUID

import psutil
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import Abort

from flows.automations import LOST
from pipeline.process.signals import die_with, identity
from pipeline.tracking.tracker import OWNER, owner

LOOK = 30.0
"""Seconds between two checks of the run's owner."""

_owned: tuple[UUID, int] | None = None


def claim(run: FlowRun) -> None:
    """Make this process the owner of a deployed flow run; its steps are stopped when another worker takes the run."""
    global _owned
    _owned = run.id, run.run_count
    os.environ[OWNER] = owner(run.run_count)
    if worker := psutil.Process().parent():
        die_with([identity(worker)], _say_no_more)
    threading.Thread(target=_watch, daemon=True).start()


def is_taken() -> bool:
    """Whether the run is marked as lost, scheduled again, or started again; False if the server does not answer."""
    if _owned is None:
        return False
    with contextlib.suppress(Exception), get_client(sync_client=True) as client:
        run = client.read_flow_run(_owned[0])
        state = run.state
        lost = state and (state.is_scheduled() or state.is_pending() or state.name == LOST)
        return bool(lost) or run.run_count != _owned[1]
    return False


def is_another_attempt() -> bool:
    """Whether the run was started before: its worker was lost, or a user retried it in Prefect."""
    return _owned is not None and _owned[1] > 1


def stop_if_taken() -> None:
    """Raises Abort, which ends the flow without changing the run's state, if another worker has taken the run."""
    if is_taken():
        raise Abort("Another worker has taken over this run: this one stops.")


def leave_to_another() -> None:
    """Raises Abort if the flow stops because its worker ends, not after a cancellation: another worker continues it."""
    if _owned is None:
        return
    with contextlib.suppress(Exception), get_client(sync_client=True) as client:
        state = client.read_flow_run(_owned[0]).state
        if state and state.is_running():
            _say_no_more()
            raise Abort("The worker stops: another one takes the run.")


def _say_no_more() -> None:
    """Redirect output to /dev/null: the worker that read it has ended, and Prefect would exit at the next line."""
    with open(os.devnull, "w") as nothing:
        for number in (1, 2):
            os.dup2(nothing.fileno(), number)


def _watch() -> None:
    while not is_taken():
        time.sleep(LOOK)
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "dvc" in child.cmdline():  # its step ends after a checkpoint
                child.terminate()
