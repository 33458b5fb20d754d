"""This flow run on Prefect's server (name, address, tags), and other runs of the same commit and settings."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.context import FlowRunContext
from prefect.logging.loggers import flow_run_logger
from prefect.settings import PREFECT_API_URL, get_current_settings

from pipeline.process.secrets import mask, without_credentials
from unfreeze.errors import UserError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

COMPUTES = "computes:"
"""Prefix of the tag with a run's commit and a hash of its settings."""
HOST = "unfreeze.host"
"""A run's label with the name of its host."""
PAUSE = 5.0
"""Seconds between two checks of the run that this one waits for."""


@contextmanager
def preparing() -> Iterator[FlowRun]:
    """The flow run of this process, before the flow starts; a `UserError` in the block is written to the run's log."""
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(UUID(os.environ["PREFECT__FLOW_RUN_ID"]))
    try:
        yield run
    except UserError as error:
        flow_run_logger(run).error(mask(str(error)))
        raise


def say_what_it_computes(run: FlowRun, what: str) -> None:
    """Tag a run with ``what``, which is the same for all runs of a commit with the same settings."""
    others = [tag for tag in run.tags if not tag.startswith(COMPUTES)]
    with get_client(sync_client=True) as client:
        client.update_flow_run(run.id, tags=[*others, f"{COMPUTES}{what}"])
        client.update_flow_run_labels(run.id, {HOST: socket.gethostname()})


def wait_for_equal(is_shared: Callable[[], bool]) -> None:
    """Wait until no earlier run of the same commit and settings is running; this run then reuses their results.

    Args:
        is_shared: whether another process uses the workspace. If not, an earlier run of this host is lost.
    """
    run = current()
    said = ""
    with get_client(sync_client=True) as client:
        while run and (other := _equal(client, run)):
            if other.labels.get(HOST) == socket.gethostname() and not is_shared():
                return  # the other run's process has ended; Prefect still lists it as running
            if said != (said := other.name):
                get_run_logger().info(
                    "The run %s computes the same (%s): this one waits until it has ended, and uses its results.",
                    other.name,
                    address(other) or other.id,
                )
            time.sleep(PAUSE)


def _equal(client: "SyncPrefectClient", run: FlowRun) -> FlowRun | None:
    """A running flow run of the same commit and settings that started earlier, by the server's clock."""
    tags = [tag for tag in client.read_flow_run(run.id).tags if tag.startswith(COMPUTES)]
    wanted = {"tags": {"all_": tags}, "state": {"type": {"any_": [StateType.RUNNING, StateType.CANCELLING]}}}
    found = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(wanted)) if tags else []
    began = {other.id: (other.state.timestamp, other.id) for other in found if other.state}
    earlier = [other for other in found if other.id in began and run.id in began and began[other.id] < began[run.id]]
    return min(earlier, key=lambda other: began[other.id], default=None)


def current() -> FlowRun | None:
    """The flow run of this process, or None."""
    context = FlowRunContext.get()
    return context.flow_run if context else None


def name_run(name: str) -> None:
    """Set the name of this process's flow run."""
    if run := current():
        with get_client(sync_client=True) as client:
            client.update_flow_run(run.id, name=name)


def address(run: FlowRun) -> str:
    """URL of a flow run's page; empty if its server is a temporary one."""
    pages = get_current_settings().ui_url if PREFECT_API_URL.value() else None
    return f"{without_credentials(pages)}/runs/flow-run/{run.id}" if pages else ""
