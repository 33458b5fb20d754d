"""The recipe as a Prefect flow: easy steps to a world-class image classifier."""

import os
from contextlib import ExitStack
from typing import Any

from prefect import flow
from prefect.exceptions import Abort, TerminationSignal

from flows.checks import check_for
from flows.owner import leave_to_another, stop_if_taken
from flows.passes import begin, finish
from flows.prefect_logs import log_sentences
from flows.prefect_server import hush
from flows.pushing import Pushing
from flows.stage import Outcome, run_stage, stage_task
from flows.workspace import at_work
from pipeline.process.forkserver import warm_process
from pipeline.process.lock import alone
from pipeline.process.signals import GRACE, end_in_time
from pipeline.tracking.tracker import SWEEP
from unfreeze.errors import UserError
from unfreeze.settings.overrides import apply_overrides, as_overrides, put_back_on_error, read_overrides

STEPS = (
    stage_task("ingest", "read every image once: validate, split, pack"),
    stage_task("explore", "look at the images: balance, samples, duplicates, leaks"),
    stage_task("precompute", "activations of the frozen backbone", gpu=True),
    stage_task("lr_find", "LR range test of the head", gpu=True),
    stage_task("train_head", "head on precomputed activations", gpu=True),
    stage_task("train_augmented", "head on augmented images", gpu=True),
    stage_task("unfreeze_lr_find", "unfreeze, LR range test again", gpu=True),
    stage_task("train_full", "whole network, SGDR, until over-fitting", gpu=True),
    stage_task("evaluate", "TTA, confusion matrix, mistakes", gpu=True),
    stage_task("retrain", "the same on train + valid, evaluated on test", gpu=True),
    stage_task("register", "a registered model version in MLflow"),
)


@flow(name="recipe", description=__doc__)
def recipe(
    settings: dict[str, Any] | list[str] | None = None,
    settings_file: str | None = None,
    until: str = "register",
    sweep: str | None = None,
) -> dict[str, Outcome]:
    """Run the recipe; a step whose inputs, settings and code have not changed is not run again.

    Args:
        settings: values to change in `params.yaml` first, for example ``{"train_full.cycles": 2}``; or a list in the
            form of `unfreeze run -S`, already checked. The changes are undone if the run cannot start. A run of the
            deployment changes the `params.yaml` of its own workspace only.
        settings_file: a file of such values, such as ``settings/photographs.yaml``; ``settings`` overrides it.
        until: the last step to run.
        sweep: for a trial, the name of its search, which becomes a tag in MLflow.

    Returns:
        Outcome of each step.

    Raises:
        UserError: a setting is wrong, or another run is active in this workspace.
        StageFailed: a step failed, with the last lines of what it printed.
        Abort: another worker has taken the run, or will take it.
    """
    log_sentences()
    names = [step.name for step in STEPS]
    if until not in names:
        raise UserError(f"until is {until!r}, but must be one of the steps: {', '.join(names)}.")
    if sweep:
        os.environ[SWEEP] = sweep
    # `at_work` waits until an equal run has ended in Prefect. Its process may still hold the lock for some seconds.
    with at_work(), alone("run", GRACE), ExitStack() as until_the_end:
        with put_back_on_error("params.yaml"):
            if settings or settings_file:
                _write(settings, settings_file)
            plan = begin()
            if plan.ask:
                until_the_end.enter_context(warm_process())
        outcomes: dict[str, Outcome] = {}
        status, pushing = "FAILED", Pushing()
        try:
            for step in STEPS[: names.index(until) + 1]:
                outcomes[step.name] = run_stage(step, plan)
                if plan.push and any(outcome.ran for outcome in outcomes.values()):
                    pushing.after(step.name)
            stop_if_taken()
            status = "FINISHED"
        except Abort:  # the pass belongs to another worker, which sets its final state
            status = ""
            raise
        # Prefect's SIGTERM handler raises TerminationSignal; Prefect's logging raises SystemExit if the worker ended.
        except (KeyboardInterrupt, TerminationSignal, SystemExit):
            status = "KILLED"
            hush()
            end_in_time()
            leave_to_another()
            raise
        finally:
            if status:
                finish(outcomes, plan, status, pushing)
        stop_if_taken()
    return outcomes


def _write(settings: dict[str, Any] | list[str] | None, settings_file: str | None) -> None:
    """Write the settings of this run into `params.yaml`. A list, from `unfreeze run`, has been checked before."""
    with alone("step", GRACE):  # wait: a step of `dvc repro` may hold the lock
        if isinstance(settings, list):
            apply_overrides("params.yaml", settings)
        elif overrides := (read_overrides(settings_file) if settings_file else []) + as_overrides(settings or {}):
            apply_overrides("params.yaml", overrides, check_for(overrides))
