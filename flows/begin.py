"""The start of a pass: settings and images are looked at, DVC says what is stale, and the pass gets its key."""

import os
import sys
import uuid
from dataclasses import dataclass

import psutil
from prefect import get_run_logger
from prefect.context import FlowRunContext

from flows import dvc
from flows.away import SAME_PASS
from flows.refusals import check_images
from tasks import STAGES
from tasks.masking import mask
from tasks.powercut import TORN, drop_torn
from tasks.stopping import PARENT, die_with, identity
from tasks.tracking import DOOR, PASS
from unfreeze.settings import load_settings


@dataclass(frozen=True)
class Plan:
    """What a pass has to look at.

    Attributes:
        ask: the stages to ask DVC for: the first stale one and all that come after it, whose inputs may change.
        pull: whether to look in DVC's remote for what the cache lacks.
        push: whether there is a remote, to push to at the end.
    """

    ask: frozenset[str]
    pull: bool
    push: bool


def begin() -> Plan:
    """Start a pass: check the settings, ask DVC what is stale, give the pass its key and a terminal to draw on.

    Raises:
        UserError: a setting is wrong, or the images cannot be listed, watched or split.
    """
    check_images(load_settings())
    for path in drop_torn():
        get_run_logger().warning(TORN, path)
    try:
        stale = dvc.stale_stages()
    except dvc.DamagedLock as error:
        aside = dvc.put_lock_aside()
        get_run_logger().warning(
            "%s It lies in %s now; what it named comes back from the cache.", mask(str(error)), aside
        )
        stale = dvc.stale_stages()
    first = min((STAGES.index(stage) for stage in stale), default=len(STAGES))
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    os.environ[PASS] = os.environ.pop(SAME_PASS, "") or f"flow-{run.id if run else uuid.uuid4()}"
    deployed = bool(run and run.deployment_id)
    os.environ[DOOR] = "deployment" if deployed else "flow"
    if deployed and (worker := psutil.Process().parent()):
        die_with([identity(worker)])
    os.environ[PARENT] = identity(psutil.Process())
    if sys.stderr.isatty():
        os.environ["UNFREEZE_TTY"] = os.ttyname(sys.stderr.fileno())
    has_remote, trouble = dvc.find_remote() if stale else (False, None)
    if trouble:
        warn_of_remote(trouble)
    return Plan(frozenset(STAGES[first:]), has_remote and trouble is None, has_remote)


def warn_of_remote(trouble: str) -> None:
    """Say that DVC's remote cannot be used, and what that means."""
    get_run_logger().warning(
        "DVC's remote cannot be used (%s): what the cache lacks is computed, and what is new is pushed later.",
        mask(trouble),
    )
