"""The start and the end of a pass.

At the start, the settings and images are checked, DVC lists the stale stages, and the pass gets its key. At the end,
results from the cache are also logged to MLflow's parent run, and new results are pushed to DVC's remote.
"""

import json
import os
import sys
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress

import psutil
from prefect import get_run_logger
from prefect.events import emit_event

from flows import dvc
from flows.automations import COMPARED
from flows.checks import check_images
from flows.flow_run import address, current, name_run
from flows.owner import claim, is_another_attempt
from flows.prefect_links import run_address
from flows.prefect_server import SAME_PASS
from flows.pushing import Pushing
from flows.stage import Outcome, Plan, warn_of_remote
from pipeline.artifacts import STAGES, artifact
from pipeline.dvc_cache import TORN, drop_torn, settle
from pipeline.process.secrets import mask
from pipeline.process.signals import PARENT, identity
from pipeline.process.workspace import link_source
from pipeline.provenance import title
from pipeline.tracking.comparison import compare_with_the_one_before
from pipeline.tracking.journal import Journal
from pipeline.tracking.local_store import adopt_files
from pipeline.tracking.sender import waiting_here
from pipeline.tracking.tracker import ADDRESS, DOOR, PASS, Delivery, begin_journal, conclude
from unfreeze.data.samples import link_sample
from unfreeze.settings.schema import flatten, load_settings

NOTHING = "Nothing to run: all %d steps are up to date."


def up_to_date(until: str) -> dict[str, Outcome]:
    """Outcomes of a pass that would run nothing, found without a Prefect server; empty if there is something to do.

    Args:
        until: the last step of the pass.

    Raises:
        UserError: DVC cannot tell what has changed.
    """
    steps = STAGES[: STAGES.index(until) + 1]
    if not all(artifact(step, "metrics.json").exists() for step in steps):
        return {}  # without asking DVC, which takes a second
    if SAME_PASS in os.environ or waiting_here() or dvc.to_push():
        return {}
    source = load_settings().data.source
    if find_stale(source, lambda text, *values: print(f"unfreeze: {text % values}", file=sys.stderr)) & set(steps):
        return {}
    return {step: Outcome(ran=False) for step in steps}


def find_stale(source: str, warn: Callable[..., None]) -> set[str]:
    """Link the images, and remove incomplete files after a power loss; returns the stages that DVC finds changed.

    Args:
        source: the setting `data.source`.
        warn: logs a warning, as `logging.Logger.warning`.

    Raises:
        UserError: DVC cannot tell what has changed.
    """
    link_sample(source)
    link_source(source)
    adopt_files()
    for path in drop_torn():
        warn(TORN, path)
    try:
        return dvc.stale_stages()
    except dvc.DamagedLock as error:
        aside = dvc.put_lock_aside()
        warn("%s It was moved to %s; the results that it listed are restored from the cache.", mask(str(error)), aside)
        return dvc.stale_stages()


def begin() -> Plan:
    """Start a pass: check settings and images, ask DVC for stale stages, set the steps' environment variables.

    Raises:
        UserError: a setting is wrong, or the images cannot be listed, watched or split.
    """
    settings = load_settings()
    check_images(settings)
    stale = find_stale(settings.data.source, get_run_logger().warning)
    first = min((STAGES.index(stage) for stage in stale), default=len(STAGES))
    run = current()
    os.environ[PASS] = os.environ.pop(SAME_PASS, "") or f"flow-{run.id if run else uuid.uuid4()}"
    deployed = bool(run and run.deployment_id)
    os.environ[DOOR] = "deployment" if deployed else "flow"
    os.environ[ADDRESS] = address(run) if run else ""
    name_run(title(flatten(settings)))
    if run and deployed:
        claim(run)
        if is_another_attempt():
            get_run_logger().info("Continuing a run that was started before, perhaps on a lost worker.")
    os.environ[PARENT] = identity(psutil.Process())
    with suppress(OSError):  # not a terminal, or one without a name, as in a container
        os.environ["UNFREEZE_TTY"] = os.ttyname(sys.stderr.fileno())
    has_remote, trouble = dvc.find_remote() if stale else (False, None)
    if trouble:
        warn_of_remote(trouble)
    return Plan(frozenset(STAGES[first:]), has_remote and trouble is None, has_remote)


def finish(outcomes: Mapping[str, Outcome], plan: Plan, status: str, pushing: Pushing) -> None:
    """Conclude the pass in MLflow, send queued results to MLflow, and push results to DVC's remote.

    Args:
        outcomes: outcomes of the steps that ended without an error.
        plan: plan of the pass.
        status: FINISHED, FAILED or KILLED.
        pushing: the pushes after each step.
    """
    log = get_run_logger()
    ran = any(outcome.ran for outcome in outcomes.values()) or is_another_attempt()
    journal: Journal | None = None
    if ran:
        journal = begin_journal("", flatten(load_settings()), {})
        conclude(journal, tuple(outcomes), status)
    elif status == "FINISHED":
        log.info(NOTHING, len(outcomes))
    if ran and status == "FINISHED":
        settle()  # flush the files that DVC cached after the last step
    if waiting_here():
        Delivery(journal, log.warning).close()
    registered = status == "FINISHED" and "register" in outcomes and outcomes["register"].ran
    if registered and os.environ[DOOR] == "deployment":
        _tell_whether_better()
    if ran and (address := run_address()):
        log.info("MLflow run: %s", address)
    if not pushing.wait() and ((ran and plan.push) or dvc.to_push()) and (trouble := dvc.push()):
        log.warning(
            "Not everything was pushed to DVC's remote; the next pass or `unfreeze publish` pushes the rest: %s",
            mask(trouble),
        )


def _tell_whether_better() -> None:
    """Compare the new version with the previous one, in the log and in a Prefect event, for notifications."""
    try:
        registered = json.loads(artifact("register", "registration.json").read_text())
        text = compare_with_the_one_before(registered["model"], registered["version"])
        emit_event(COMPARED, {"prefect.resource.id": f"{COMPARED}.{registered['model']}"}, payload={"text": text})
        get_run_logger().info(text)
    except Exception as error:  # if a server does not answer, only this is skipped
        get_run_logger().warning("Not compared with the previous version: %s", mask(str(error)).split("\n")[0])
