"""Start, wait for and stop processes of servers and workers, each with a separate log."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unfreeze.errors import UserError

PATIENCE = 300.0
"""Timeout in seconds for a server to become ready; its first start creates its database."""
GOODBYE = 60.0
"""Seconds between asking a process to end and killing it; in this time a worker's run writes a checkpoint."""


@dataclass
class Part:
    """A running process.

    Attributes:
        name: name for messages.
        process: the process.
        log: file of its output.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def see_that_it_runs(self) -> None:
        """Raises UserError if the process has ended."""
        if self.process.poll() is not None:
            raise UserError(f"{self.name} has ended (code {self.process.returncode}): see {self.log}.")


@contextmanager
def running(
    name: str,
    command: Sequence[str | Path],
    environment: Mapping[str, str],
    logs: Path,
    *,
    cwd: Path | None = None,
    user: str | None = None,
    stop: int = signal.SIGTERM,
) -> Iterator[Part]:
    """Run a process while the block runs. Then stop the process, and kill it if it does not end.

    Args:
        name: name of the process and of its log.
        command: its command line. It must not contain secrets, because other users can see it.
        environment: its complete environment.
        logs: folder of the log. New output is appended to the log.
        cwd: its working directory.
        user: account that runs it, if this process runs as root.
        stop: the signal that stops it.
    """
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{name.lower().replace(' ', '-')}.log"
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=cwd,
            start_new_session=True,  # so that Ctrl-C reaches only this process, which stops the others in order
            **as_user(user),
        )  # fmt: skip
    try:
        yield Part(name, process, log)
    finally:
        end(process, stop)


def end(process: subprocess.Popen[bytes], stop: int = signal.SIGTERM) -> None:
    """Stop a process, or kill it if it does not end in time. Then kill the rest of its process group."""
    process.send_signal(stop)
    try:
        process.wait(GOODBYE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def wait_until(ready: Callable[[], bool], part: Part) -> None:
    """Wait until a server is ready. Raises UserError if the server ends, or is not ready in time."""
    until = time.monotonic() + PATIENCE
    while not ready():
        part.see_that_it_runs()
        if time.monotonic() > until:
            raise UserError(f"{part.name} is not ready after {PATIENCE:.0f} seconds: see {part.log}.")
        time.sleep(0.2)


def answers(address: str) -> bool:
    """Whether a server answers at an address; an HTTP error is also an answer."""
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def is_free(port: int) -> bool:
    """Whether a port of this machine is free."""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore connections that have ended
        try:
            tried.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def as_user(name: str | None) -> dict[str, Any]:
    """Arguments for `subprocess` to run a process as this user, if this process runs as root; empty for None."""
    import pwd

    return {"user": name, "group": pwd.getpwnam(name).pw_gid, "extra_groups": []} if name else {}
