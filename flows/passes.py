"""The start and the end of a pass.

At the start, the settings and images are checked, DVC lists the stale stages, and the pass gets its key. At the end,
results from the cache are also logged to MLflow's parent run, and new results are pushed to DVC's remote.
"""

import json
import os
import sys
import uuid
from collections.abc import Mapping
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


def begin() -> Plan:
    """Start a pass: check the settings, ask DVC for stale stages, set the key of the pass and the terminal.

    Raises:
        UserError: a setting is wrong, or the images cannot be listed, watched or split.
    """
    settings = load_settings()
    check_images(settings)
    link_sample(settings.data.source)
    link_source(settings.data.source)
    adopt_files()
    for path in drop_torn():
        get_run_logger().warning(TORN, path)
    try:
        stale = dvc.stale_stages()
    except dvc.DamagedLock as error:
        aside = dvc.put_lock_aside()
        get_run_logger().warning(
            "%s It was moved to %s; the results that it listed are restored from the cache.", mask(str(error)), aside
        )
        stale = dvc.stale_stages()
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
    with suppress(OSError):  # a terminal may have no name, for example in a container
        os.environ["UNFREEZE_TTY"] = os.ttyname(sys.stderr.fileno())
    has_remote, trouble = dvc.find_remote() if stale else (False, None)
    if trouble:
        warn_of_remote(trouble)
    return Plan(frozenset(STAGES[first:]), has_remote and trouble is None, has_remote)


def finish(outcomes: Mapping[str, Outcome], plan: Plan, status: str, pushing: Pushing) -> None:
    """Conclude the pass, and send the queued results of earlier passes.

    Args:
        outcomes: outcomes of the steps that are up to date.
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
        log.info("Nothing to run: all %d steps are up to date.", len(outcomes))
    if ran and status == "FINISHED":
        settle()  # files that DVC cached after the last step
    if waiting_here():
        Delivery(journal, log.warning).close()
    if (
        status == "FINISHED"
        and "register" in outcomes
        and outcomes["register"].ran
        and os.environ[DOOR] == "deployment"
    ):
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
