"""The end of a pass: what came from the cache is put on MLflow's parent run too, and DVC's remote gets what is new."""

from collections.abc import Mapping

from prefect import get_run_logger

from flows import dvc
from flows.links import run_address
from flows.stage import Outcome, Plan
from tasks import STAGES
from tasks.tracking import client, conclude, find_parent


def finish(outcomes: Mapping[str, Outcome], plan: Plan) -> None:
    """Conclude the pass.

    Args:
        outcomes: of the steps that are up to date.
        plan: of the pass.
    """
    log = get_run_logger()
    if not any(outcome.ran for outcome in outcomes.values()):
        log.info("Nothing to run: all %d steps are up to date.", len(outcomes))
        return
    if plan.pull and (trouble := dvc.push()):
        log.warning("DVC's remote did not take everything; `dvc push --run-cache` later sends the rest: %s", trouble)
    try:
        _conclude(outcomes)
    except Exception as error:
        log.warning("MLflow's parent run could not be concluded: %s", str(error).splitlines()[0])


def _conclude(outcomes: Mapping[str, Outcome]) -> None:
    mlflow = client()
    if parent := find_parent(mlflow):
        done = len(outcomes) == len(STAGES)
        conclude(mlflow, parent, tuple(outcomes), "FINISHED" if done else "FAILED")
        address = run_address(mlflow.get_run(parent).info.experiment_id, parent)
        get_run_logger().info("MLflow run: %s", address)
