"""A Prefect task that has DVC reproduce one stage."""

import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from prefect import Task, get_run_logger, task
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed

from flows import dvc
from flows.owner import is_taken, stop_if_taken
from flows.prefect_links import publish_links
from flows.prefect_server import has_server
from pipeline.exit_codes import LESS_MEMORY, USER_ERROR
from pipeline.process.secrets import mask
from pipeline.tracking.tracker import PASS


@dataclass(frozen=True)
class Plan:
    """Stages to check, and whether to use the remote.

    Attributes:
        ask: the stages to call DVC for: the first stale one and all later ones, whose inputs may change.
        pull: whether to look in DVC's remote for results that are not in the cache.
        push: whether there is a remote, to which results are pushed after each step.
    """

    ask: frozenset[str]
    pull: bool
    push: bool


@dataclass(frozen=True)
class Outcome:
    """Outcome of a step: whether its command ran (otherwise its outputs were up to date, or in the cache), and its
    duration in seconds."""

    ran: bool
    seconds: float = 0.0


_without_remote: set[str] = set()
"""Passes during which the remote stopped answering; this is logged once, and the remote is not tried again."""

KILLED = f"It was killed (SIGKILL), as the system does when memory runs out. {LESS_MEMORY}"
"""Message for a step that got SIGKILL."""


class StageFailed(Exception):
    """A stage's command failed; the message ends with the last lines of what it printed."""

    def __init__(self, stage: str, lines: list[str], retry: bool) -> None:
        super().__init__(f"The step {stage} failed:\n" + "\n".join(lines))
        self.retry = retry


def worth_a_retry(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether to retry a failed task: not after a user error, nor if another worker has taken the run."""
    if is_taken():
        return False
    try:
        state.result()
    except StageFailed as error:
        return error.retry
    except Exception:
        return True
    return True


def stage_task(stage: str, description: str, gpu: bool = False) -> Task[[Plan], Any]:
    """The Prefect task of a stage; it ends as ``Completed``, or as ``Cached`` if there was nothing to run.

    It asks DVC for exactly this stage, whose command runs the step in a separate process; the step's output goes
    to Prefect's log line by line.

    Args:
        stage: name of the stage, and of the task.
        description: what Prefect's UI shows.
        gpu: whether the step uses a GPU; its task then has the tag ``gpu``, which can be given a concurrency limit.
    """

    @task(
        name=stage,
        task_run_name=stage,
        description=description,
        tags=["unfreeze", "gpu"] if gpu else ["unfreeze"],
        retries=2,
        retry_delay_seconds=[10, 60],
        retry_condition_fn=worth_a_retry,
        timeout_seconds=24 * 3600,
    )
    def reproduce(plan: Plan) -> State[None]:
        if stage not in plan.ask or not _run(stage, plan.pull):
            return Completed(name="Cached", message=f"{stage}: nothing to run")
        return Completed(message=f"{stage}: done")

    return reproduce


def run_stage(task: Task[[Plan], Any], plan: Plan) -> Outcome:
    """Run a stage's task; returns its outcome. Raises the task's error, or Abort if another worker owns the run."""
    stop_if_taken()
    start = time.monotonic()
    if not has_server():
        # A task with tags asks for their concurrency limits, which a temporary server does not have. With SQLite, the
        # answer is often 503 (the database is locked), and the client waits for two seconds before it asks again.
        task = task.with_options(tags=[])
    state = task(plan, return_state=True)
    if state.is_failed() or state.is_crashed() or state.is_cancelled():
        stop_if_taken()
        state.result()
    return Outcome(state.name != "Cached", time.monotonic() - start)


def _run(stage: str, pull: bool) -> bool:
    """Have DVC reproduce the stage; returns whether its command ran."""
    log = get_run_logger()
    pull = pull and os.environ[PASS] not in _without_remote
    tail: deque[str] = deque(maxlen=15)
    ran = True
    try:
        for line in dvc.reproduce(stage, pull):
            ran = ran and not dvc.is_cached(line)
            if not dvc.is_noise(line):
                line = mask(line)
                tail.append(line)
                _clear_line()
                log.info(line)
    except subprocess.CalledProcessError:
        if pull and not any(re.search(r"exited with -?\d+", line) for line in tail):
            warn_of_remote(tail[-1] if tail else "it does not say why")
            _without_remote.add(os.environ[PASS])
            return _run(stage, pull=False)
        retry = not any(re.search(rf"exited with {USER_ERROR}\b", line) for line in tail)
        if any(re.search(rf"exited with -{signal.SIGKILL:d}\b", line) for line in tail):
            tail.append(KILLED)
        raise StageFailed(stage, list(tail), retry) from None
    publish_links(stage)
    return ran


def _clear_line() -> None:
    """Clear a progress bar from the terminal before a line is logged over it."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")


def warn_of_remote(trouble: str) -> None:
    """Log that DVC's remote cannot be used, and the consequences."""
    get_run_logger().warning(
        "DVC's remote cannot be used (%s): results that are not in the cache are computed, and pushed later.",
        mask(trouble),
    )
