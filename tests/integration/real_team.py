"""A team with real parts: servers on PostgreSQL and S3 with passwords, a bare repository, and separate machines.

A machine is a folder with its own HOME, UNFREEZE_HOME and clone. Machines share only the servers and the repository. A
machine's worker runs the code that the deployment's pull step (`flows.workspace.prepare`) fetches.
"""

import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from deploy.servers import Ports, Servers
from tests.integration.project import SMALL, Project, make_project
from tests.integration.servers import ask, deploy, free_port, started, until
from unfreeze.settings.overrides import apply_overrides

GIT = ("git", "-c", "user.name=t", "-c", "user.email=t@t")


@dataclass
class RealTeam:
    """Servers, the deployed checkout, and machines.

    Attributes:
        base: folder that contains everything.
        servers: servers from `deploy/servers.py`.
        checkout: a user's checkout; runs start from its pushed commits.
        stack: contexts that end before the servers do.
    """

    base: Path
    servers: Servers
    checkout: Project
    stack: ExitStack

    @property
    def repository(self) -> Path:
        """The remote repository."""
        return self.base / "repository.git"

    def machine(self, name: str) -> Project:
        """A machine; the first call creates its clone."""
        home = self.base / name
        if not home.exists():
            home.mkdir()
            subprocess.run(["git", "clone", "-q", self.repository, home / "project"], check=True)
        own = {"HOME": str(home), "PREFECT_HOME": str(home / "prefect"), "UNFREEZE_HOME": str(home / "unfreeze")}
        return Project(home / "project", self.checkout.environment | own)

    def log(self, name: str) -> Path:
        """Log file of a machine's worker."""
        return self.base / f"{name}.log"

    def worker(self, name: str) -> AbstractContextManager["subprocess.Popen[bytes]"]:
        """Run a machine's worker while the block runs."""
        words = ("prefect", "worker", "start", "--pool", "gpu", "--limit", "1", "--name", name)
        return started(self.machine(name), self.log(name), *words)

    def deploy(self) -> None:
        """Run `make deploy` in the checkout."""
        deploy(self.checkout)

    def push(self, message: str) -> str:
        """Commit and push the changes in the checkout; returns the commit."""
        for words in (["add", "-A"], ["commit", "-qm", message], ["push", "-q", "origin", "main"]):
            subprocess.run([*GIT, *words], cwd=self.checkout.folder, check=True)
        return self.checkout.git("rev-parse", "HEAD")

    def request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send a request to the Prefect server: POST with a body, GET without."""
        return ask(f"{self.servers.prefect}/{path}", body, self.servers.client["PREFECT_API_AUTH_STRING"])

    def start(self, **parameters: Any) -> str:
        """Start a run of the deployment, as Prefect's web pages do; returns its ID."""
        deployment = self.request("deployments/name/recipe/nightly")["id"]
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return str(self.request(f"deployments/{deployment}/create_flow_run", body)["id"])

    def state(self, run: str) -> dict[str, Any]:
        """A flow run, as stored on the server."""
        return dict(self.request(f"flow_runs/{run}"))

    def wait(self, run: str, *states: str, seconds: float = 1800) -> dict[str, Any]:
        """Wait until a run is in one of these states; returns the flow run."""
        until(lambda: self.state(run)["state_type"] in states, seconds, lambda: self.said(run))
        return self.state(run)

    def finish(self, run: str, seconds: float = 1800) -> dict[str, Any]:
        """Wait for the end of a run, which must succeed; returns the flow run."""
        ended = self.wait(run, "COMPLETED", "FAILED", "CRASHED", "CANCELLED", seconds=seconds)
        assert ended["state_type"] == "COMPLETED", self.said(run)
        return ended

    def said(self, run: str) -> str:
        """The log of a flow run."""
        wanted = {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200, "sort": "TIMESTAMP_DESC"}
        return "\n".join(record["message"] for record in reversed(self.request("logs/filter", wanted)))

    @property
    def mlflow(self) -> MlflowClient:
        """MLflow client with the account of the team's user."""
        user, password = (self.servers.client[f"MLFLOW_TRACKING_{name}"] for name in ("USERNAME", "PASSWORD"))
        return MlflowClient(self.servers.mlflow.replace("://", f"://{user}:{password}@"))

    def logged(self, **tags: str) -> list[Any]:
        """MLflow runs with these tags, newest first."""
        experiment = self.mlflow.get_experiment_by_name("team")
        found = self.mlflow.search_runs([experiment.experiment_id], max_results=1000) if experiment else []
        return [run for run in found if tags.items() <= run.data.tags.items()]

    def parent(self, run: str) -> Any:
        """The MLflow parent run of a flow run; there must be exactly one."""
        parents = [one for one in self.logged() if "mlflow.parentRunId" not in one.data.tags]
        (found,) = [one for one in parents if run in one.data.tags.get("mlflow.note.content", "")]
        return found


@contextmanager
def real_team(base: Path, settings: dict[str, str] = SMALL) -> Iterator[RealTeam]:
    """A team whose deployment has no worker yet.

    Args:
        base: a folder that every user can enter.
        settings: settings in the repository.
    """
    servers = Servers(base / "servers", Ports(*(free_port() for _ in range(4))))
    (base / "person").mkdir()
    checkout = make_project(base / "person", settings)
    checkout.environment |= servers.client | {
        "HOME": str(base / "person"),
        "UNFREEZE_HOME": str(base / "person/unfreeze"),
    }
    (base / "person/photos").rename(base / "photos")
    apply_overrides(checkout.folder / "params.yaml", [f"data.source={base}/photos"])
    team = RealTeam(base, servers, checkout, ExitStack())
    subprocess.run(["git", "init", "-q", "--bare", "-b", "main", team.repository], check=True)
    checkout.git("remote", "add", "origin", str(team.repository))
    team.push("start")
    with servers.started(), team.stack:
        team.deploy()
        yield team
