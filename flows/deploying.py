"""`make deploy`: deploy `prefect.yaml` from the branch of this checkout; a paused deployment stays paused."""

import subprocess
import sys
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.filters import FlowFilter

from pipeline.process.git import GitError, git
from pipeline.process.secrets import without_credentials
from unfreeze.errors import UserError


def deploy() -> int:
    """Deploy with Prefect; returns its exit code.

    Prefect would resume paused deployments (but not paused schedules that have a slug), so they are paused again.
    """
    of_recipe = FlowFilter.model_validate({"name": {"any_": ["recipe"]}})
    with get_client(sync_client=True) as client:
        paused = [deployment.id for deployment in client.read_deployments(flow_filter=of_recipe) if deployment.paused]
        code = subprocess.run([sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]).returncode
        for deployment in paused:
            client.update_deployment(deployment, DeploymentUpdate(paused=True))
    return code


def source() -> dict[str, str]:
    """The deployment's build step: the source of its code.

    Returns:
        ``repository``: the remote `origin` of this checkout, or the checkout if it has none; ``branch``: its branch.

    Raises:
        UserError: no branch is checked out, or Git failed.
    """
    try:
        branch = git("branch", "--show-current")
        top = git("rev-parse", "--show-toplevel")
        repository = git("remote", "get-url", "origin") if "origin" in git("remote").splitlines() else top
    except GitError as error:
        raise UserError(f"The deployment runs the commits of a branch, but Git failed: {error}.") from None
    if not branch:
        raise UserError("The deployment runs the commits of a branch: check one out (`git switch main`).")
    if Path(top, repository).exists():
        repository = str(Path(top, repository).resolve())
    if repository.startswith("http"):  # in ssh://git@host, the user is part of the address
        repository = without_credentials(repository)
    return {"repository": repository, "branch": branch}


if __name__ == "__main__":
    sys.exit(deploy())
