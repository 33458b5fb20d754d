"""`unfreeze publish`: MLflow and DVC's remote get what they were not there to take."""

import sys
import time

from flows import dvc
from tasks.journal import Busy, read_json, waiting
from tasks.masking import mask
from tasks.publishing import Unreachable, address, client, reaching, send

BUSY = 60.0
"""Seconds to wait for another process that is sending."""


def publish(anyway: bool) -> int:
    """Send what waits, and say so.

    Args:
        anyway: send also what was meant for another tracking server.

    Returns:
        the exit code: 0 when nothing waits any more.
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
    """A sentence that says what waits, nothing where nothing does."""
    sentences = []
    if count := len(waiting()):
        sentences.append(f"MLflow at {address()} has not got everything: {_steps(count)} wait.")
    if dvc.to_push():
        sentences.append("DVC's remote has not got everything.")
    return " ".join(sentences)


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
        return [f"{error} {_steps(len(waiting()))} wait; try again later."]
    left = [read_json(folder / "head.json").get("address") for folder in waiting()]
    others = sorted({str(other) for other in left} - {address()})
    if others:
        return [
            f"{_steps(len(left))} wait for MLflow at {', '.join(others)}, and MLFLOW_TRACKING_URI names {address()}: "
            "change it, or say --anyway."
        ]
    return [f"{_steps(len(left))} are being run now, or wait for their files' place."] if left else []


def _steps(count: int) -> str:
    return f"{count} {'record of a step' if count == 1 else 'records of steps'}"
