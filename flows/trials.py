"""Trials of a search: passes in worktrees on this machine, or runs of a deployment on its workers."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.deployments import run_deployment
from prefect.states import Cancelling

from flows import dvc
from flows.prefect_server import SAME_PASS, has_server
from pipeline.process.signals import GRACE
from pipeline.tracking.tracker import SWEEP
from unfreeze.data.samples import SAMPLES, link_sample
from unfreeze.errors import UserError
from unfreeze.settings.overrides import apply_overrides, as_overrides
from unfreeze.settings.schema import Settings

LAST = "evaluate"
"""Last step of a trial: trials are rated on validation images, and do not register a model."""


@dataclass
class LocalTrial:
    """A pass in a worktree; ``key``, the key of the pass, is a tag in MLflow."""

    key: str
    process: subprocess.Popen[bytes]

    def ended(self) -> bool | None:
        """Whether the trial succeeded; None while it runs."""
        code = self.process.poll()
        return None if code is None else code == 0

    def stop(self) -> None:
        """Stop the trial; when started again, it continues from its checkpoints."""
        self.process.terminate()
        try:
            self.process.wait(2 * GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()


class LocalTrials:
    """Runs trials on this machine, each in one of several worktrees of the committed code, which share DVC's cache.

    Results of steps that do not depend on the changed settings are reused from the worktree or the cache.
    """

    def __init__(self, study: str, folder: Path, settings: Settings) -> None:
        """Prepare; ``settings`` are the base settings of the trials."""
        self._study, self._folder, self._source = study, folder, settings.data.source

    def start(self, number: int, slot: int, settings: Mapping[str, Any], known: str | None) -> LocalTrial:
        """Start or continue a trial.

        Args:
            number: number of the trial.
            slot: number of the worktree; no other running trial may use it.
            settings: ``section.key -> value``, overriding `params.yaml`.
            known: not used.
        """
        here = self._worktree(slot)
        (here / "params.yaml").write_bytes(Path("params.yaml").read_bytes())
        source = self._source if self._source in SAMPLES else os.path.abspath(self._source)
        apply_overrides(here / "params.yaml", as_overrides({"data.source": source, **settings}))
        key = f"sweep-{self._study}-{number}"
        environment = os.environ | {
            SAME_PASS: key,
            SWEEP: self._study,
            "MLFLOW_TRACKING_URI": _absolute(os.environ["MLFLOW_TRACKING_URI"]),
            "PYTHONPATH": str(here.resolve()),
        }
        with (self._folder / f"trial-{number}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "flows.cli", "run", "--until", LAST], cwd=here, env=environment, stdout=log,
                stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        return LocalTrial(key, process)

    def _worktree(self, slot: int) -> Path:
        here = self._folder / f"worktree-{slot}"
        if not (here / ".git").exists():
            done = subprocess.run(
                ["git", "worktree", "add", "--quiet", "--force", "--detach", here, "HEAD"],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise UserError(f"git could not create a worktree for trials in {here}: {done.stderr.strip()}")
            dvc.share_cache(here)
            link_sample(self._source, here)
        return here

    def close(self) -> None:
        """Remove the worktrees; logs stay."""
        for here in self._folder.glob("worktree-*"):
            subprocess.run(["git", "worktree", "remove", "--force", here], capture_output=True)


@dataclass
class DeployedTrial:
    """A run of a deployment; its methods are as in `LocalTrial`."""

    key: str
    id: str

    def ended(self) -> bool | None:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(self.id)).state
        return state.is_completed() if state and state.is_final() else None

    def stop(self) -> None:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(UUID(self.id), Cancelling())


Trial = LocalTrial | DeployedTrial


class DeployedTrials:
    """Runs trials as runs of a deployment; Prefect gives them to its workers."""

    def __init__(self, study: str, deployment: str) -> None:
        if not has_server():
            raise UserError(f"deployment {deployment} needs a Prefect server: set PREFECT_API_URL.")
        self._study, self._deployment = study, deployment

    def start(self, number: int, slot: int, settings: Mapping[str, Any], known: str | None) -> DeployedTrial:
        """Start a flow run for a trial, or find its earlier one by the ID ``known``; number and slot are not used."""
        if known is None:
            parameters = {"settings": dict(settings), "until": LAST, "sweep": self._study}
            run: Any = run_deployment(self._deployment, parameters=parameters, timeout=0, as_subflow=False)
            known = str(run.id)
        return DeployedTrial(f"flow-{known}", known)

    def close(self) -> None:
        """Do nothing: there is nothing to remove."""


def _absolute(address: str) -> str:
    """Make the path in the address of an SQLite database absolute; other addresses are unchanged."""
    path = address.removeprefix("sqlite:///")
    return address if path == address else f"sqlite:///{os.path.abspath(path)}"
