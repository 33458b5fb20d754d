"""The end of a pass: what came from the cache is put on MLflow's parent run too, and DVC's remote gets what is new."""

from collections.abc import Mapping

from prefect import get_run_logger

from flows import dvc
from flows.begin import Plan
from flows.links import run_address
from flows.stage import Outcome
from tasks.journal import Journal
from tasks.masking import mask
from tasks.powercut import settle
from tasks.publishing import waiting_here
from tasks.tracking import Delivery, begin_journal, conclude
from unfreeze.settings import flatten, load_settings


def finish(outcomes: Mapping[str, Outcome], plan: Plan, status: str) -> None:
    """Conclude the pass, and send what earlier passes have left.

    Args:
        outcomes: of the steps that are up to date.
        plan: of the pass.
        status: FINISHED, FAILED or KILLED.
    """
    log = get_run_logger()
    ran = any(outcome.ran for outcome in outcomes.values())
    journal: Journal | None = None
    if ran:
        journal = begin_journal("", flatten(load_settings()), {})
        conclude(journal, tuple(outcomes), status)
    elif status == "FINISHED":
        log.info("Nothing to run: all %d steps are up to date.", len(outcomes))
    if ran and status == "FINISHED":
        settle()  # what the last step's DVC has taken
    if waiting_here():
        Delivery(journal, log.warning).close()
    if ran and (address := run_address()):
        log.info("MLflow run: %s", address)
    if ((ran and plan.push) or dvc.to_push()) and (trouble := dvc.push()):
        log.warning(
            "DVC's remote did not take everything; the next pass sends the rest, or `unfreeze publish`: %s",
            mask(trouble),
        )
