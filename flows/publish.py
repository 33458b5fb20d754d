"""`unfreeze publish`: send queued results to MLflow and DVC's remote."""

import sys
import time

from flows import dvc
from pipeline.process.secrets import mask
from pipeline.tracking.journal import Busy, waiting
from pipeline.tracking.sender import Unreachable, address, client, meant_for, reaching, send, waiting_here

BUSY = 60.0
"""Seconds to wait for another process that is sending."""


def publish(anyway: bool) -> int:
    """Send queued results, and print what was sent.

    Args:
        anyway: send also results queued for another tracking server.

    Returns:
        the exit code: 0 when everything is sent.
    """
    before, pushed = waiting(), dvc.to_push()
    if not before and not pushed:
        print("Nothing waits: MLflow has everything.")
        return 0
    trouble = []
    if before:
        trouble += _send(anyway)
        if sent := len(before) - len(set(before) & set(waiting())):
            print(f"Sent to MLflow at {address()}: {_steps(sent)}.")
    if pushed and (problem := dvc.push(pauses=())):
        trouble.append(f"DVC's remote did not take everything: {mask(problem)}")
    elif pushed:
        print("Pushed to DVC's remote.")
    for sentence in trouble:
        print(f"unfreeze: {sentence}", file=sys.stderr)
    return 1 if trouble else 0


def what_waits() -> str:
    """Describe queued results, and how to send them; empty if there are none."""
    sentences = []
    if count := len(waiting_here()):
        sentences.append(f"{_steps(count)} not yet sent to MLflow at {address()}.")
    if dvc.to_push():
        sentences.append("Results not yet pushed to DVC's remote.")
    if sentences:
        sentences.append("`unfreeze publish` sends them, and so does the next run.")
    return " ".join([*sentences, *_elsewhere()])


def _elsewhere() -> list[str]:
    """Describe results queued for other servers than that of the environment; empty if there are none."""
    others = [server for folder in waiting() if (server := meant_for(folder)) != address()]
    if not others:
        return []
    return [
        f"{_wait(len(others))} for MLflow at {', '.join(sorted(set(others)))}, but MLFLOW_TRACKING_URI names "
        f"{address()}: change it, or run `unfreeze publish --anyway`."
    ]


def _send(anyway: bool) -> list[str]:
    until = time.monotonic() + BUSY
    try:
        with reaching():
            while True:
                try:
                    for _ in send(client(), anyway=anyway):
                        pass
                    break
                except Busy:
                    if time.monotonic() > until:
                        return ["Another process is sending; try again when it has ended."]
    except Unreachable as error:
        return [f"{error} {_wait(len(waiting()))}; try again later."]
    here = len(waiting_here())
    return _elsewhere() + ([f"{_wait(here)}: a step is running, or the artifact store is unavailable."] if here else [])


def _steps(count: int) -> str:
    return f"{count} {'record of a step' if count == 1 else 'records of steps'}"


def _wait(count: int) -> str:
    return f"{_steps(count)} wait{'s' * (count == 1)}"
