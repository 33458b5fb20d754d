"""Helpers for tests with real servers: start them, wait for them, send requests to Prefect, find running steps."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import urllib3

from tests.integration.project import ROOT, Project


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def started(project: Project, log: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server or worker in a separate process group; the whole group is ended afterwards."""
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=project.folder,
            env=project.environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # a test may have killed it
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def until(look: Callable[[], Any], seconds: float = 180, why: Callable[[], str] = str) -> Any:
    """Wait until ``look`` returns a true value; returns this value. ``why`` returns a message for the timeout.

    The timeout is long because busy machines are slow.
    """
    end = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < end, f"not within {seconds} seconds\n{why()}"
        time.sleep(0.2)
    return seen


def wait_for(address: str, log: Path) -> None:
    """Wait until a server answers at an address."""

    def answers() -> bool:
        with suppress(OSError), urllib.request.urlopen(address, timeout=2):
            return True
        return False

    until(answers, 300, log.read_text)


def deploy(project: Project) -> None:
    """Run `make deploy` in a project, with the Python environment of this test."""
    command = ["make", "--file", str(ROOT / "Makefile"), "--old-file", ".venv/.ready", "deploy"]
    done = subprocess.run(command, cwd=project.folder, env=project.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def ask(address: str, body: dict[str, Any] | None = None, credentials: str = "") -> Any:
    """Request JSON from a server: POST with a body, GET without. ``credentials`` have the form user:password.

    A request that is answered with 503 is sent again, as Prefect's own client does: its server answers this when SQLite
    rejects a write because of another transaction. Nothing was written then.
    """
    answer = urllib3.request(
        "GET" if body is None else "POST",
        address,
        json=body,
        headers=urllib3.make_headers(basic_auth=credentials or None),
        retries=urllib3.Retry(5, connect=0, read=0, status_forcelist=[503], allowed_methods=None, backoff_factor=0.5),
        timeout=30,
    )
    assert answer.status < 400, f"{address}: {answer.status} {answer.reason}\n{answer.data.decode()}"
    return json.loads(answer.data or "null")


def errors_in(log: Path) -> list[str]:
    """Records in a Prefect server's log that report an error, each with its traceback."""
    records = re.split(r"^(?=\d\d:\d\d:\d\d\.\d+ \| )", log.read_text(), flags=re.MULTILINE)
    return [record for record in records if re.search("ERROR|CRITICAL|Traceback", record)]


def at_work(pid: int) -> list[psutil.Process]:
    """Wait until a step of a worker's flow is running; returns all processes that the worker has started."""

    def family() -> list[psutil.Process]:
        found = psutil.Process(pid).children(recursive=True)
        for process in found:
            with suppress(psutil.Error):
                if "tasks" in process.cmdline():  # python -m tasks <step>
                    return found
        return []

    return list(until(family, 300))
