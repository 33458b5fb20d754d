"""Processes of servers and workers: started with a log of their own, waited for, stopped."""

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
"""Seconds between asking a process to end and killing it; a worker's run writes a checkpoint."""


@dataclass
class Part:
    """A process that is at work.

    Attributes:
        name: what people call it.
        process: the process.
        log: what it prints.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def see_that_it_runs(self) -> None:
        """Raises UserError where it has ended."""
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
    """Run a process while the block runs; then stop it, and kill it if it does not end.

    Args:
        name: name of the process and of its log.
        command: its command line; without secrets, as other users can see it.
        environment: its complete environment.
        logs: folder of the log, which is appended to.
        cwd: its working directory.
        user: the account to run it as, where this is root's.
        stop: the signal that it is stopped with.
    """
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{name.lower().replace(' ', '-')}.log"
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=cwd,
            start_new_session=True,  # Ctrl-C is for us: they are stopped in order
            **as_user(user),
        )  # fmt: skip
    try:
        yield Part(name, process, log)
    finally:
        end(process, stop)


def end(process: subprocess.Popen[bytes], stop: int = signal.SIGTERM) -> None:
    """Stop a process; kill it, and what it has left in its process group, where it does not end."""
    process.send_signal(stop)
    try:
        process.wait(GOODBYE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def wait_until(ready: Callable[[], bool], part: Part) -> None:
    """Wait until a server says that it is ready. Raises UserError where it ends, or is not in time."""
    until = time.monotonic() + PATIENCE
    while not ready():
        part.see_that_it_runs()
        if time.monotonic() > until:
            raise UserError(f"{part.name} is not ready after {PATIENCE:.0f} seconds: see {part.log}.")
        time.sleep(0.2)


def answers(address: str) -> bool:
    """Whether a server answers at an address; a refusal is an answer too."""
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def is_free(port: int) -> bool:
    """Whether nobody listens on a port of this machine."""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of connections that have ended
        try:
            tried.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def as_user(name: str | None) -> dict[str, Any]:
    """Arguments for `subprocess` with which a process of root's runs another as this user; empty for None."""
    import pwd

    return {"user": name, "group": pwd.getpwnam(name).pw_gid, "extra_groups": []} if name else {}
