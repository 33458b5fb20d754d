"""Prefect's server: the one set by the user, or a temporary one with a separate database in the workspace.

If the user's server does not answer, the pass continues with a temporary one. Prefect retries for about a minute
(`PREFECT_CLIENT_MAX_RETRIES`), and then the flow fails. `unfreeze run` then replaces its process by a new one with a
temporary server. The new process continues at the interrupted step, because DVC skips the finished steps.
"""

import logging
import os
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NoReturn

from pipeline.process.lock import FOLDER
from pipeline.process.secrets import mask
from pipeline.process.signals import PARENT
from pipeline.tracking.tracker import PASS
from unfreeze.errors import UserError

SAME_PASS = "UNFREEZE_SAME_PASS"
"""Environment variable: the key of the pass to continue."""


DATABASES = ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL")
"""Environment variables for the database of the temporary server."""

ANSWERS = 5.0
"""Timeout in seconds of a request to the server, and of sending the last records to a temporary one."""

ROOT_LEVEL = "PREFECT_LOGGING_ROOT_LEVEL"
"""Environment variable: log level of a server's libraries. SQLAlchemy would log a traceback at the server's end."""

TALK = ("prefect.client", "prefect.events", "prefect.logging", "prefect._internal", "EventsWorker", "APILogWorker")
"""Prefect's loggers that report records which could not be sent to a server."""


def check_api() -> None:
    """Check that the address of Prefect's server, if one is set, is that of its API; the server may be unreachable.

    Raises:
        UserError: something else answers there; says what to write.
    """
    from prefect.settings import PREFECT_API_URL

    if not (url := str(PREFECT_API_URL.value() or "").rstrip("/")):
        return
    if not url.startswith(("http://", "https://")):
        raise UserError(f"PREFECT_API_URL is {mask(url)}, but must begin with http:// or https://.")
    if _is_api(url) is not False:
        return
    if _is_api(f"{url}/api"):
        raise UserError(
            f"PREFECT_API_URL is {mask(url)}, where Prefect's pages are. Its API is at {mask(url)}/api: write that."
        )
    raise UserError(
        f"PREFECT_API_URL is {mask(url)}, where something answers that is not Prefect's API. Write the address that "
        "`prefect server start` shows, such as http://127.0.0.1:4200/api, or nothing for a temporary server."
    )


def _is_api(url: str) -> bool | None:
    """Whether Prefect's API is at an address; None if there is no answer, or an HTTP error 401, 403 or 5xx."""
    import httpx

    try:
        response = httpx.get(f"{url}/health", timeout=ANSWERS, follow_redirects=True)
    except httpx.InvalidURL as error:
        raise UserError(f"PREFECT_API_URL is {mask(url)}, which is not a valid address: {error}.") from None
    except httpx.HTTPError:
        return None
    if response.status_code in (401, 403) or response.status_code >= 500:
        return None
    return response.text.strip() == "true"


def has_server() -> bool:
    """Whether the user has set the address of a Prefect server."""
    from prefect.settings import PREFECT_API_URL

    return bool(PREFECT_API_URL.value())


@contextmanager
def prefect_server() -> Iterator[None]:
    """Provide a Prefect server for the flow in the block: the user's, or a temporary one.

    After the block, a temporary server receives the flow's remaining records (for `ANSWERS` seconds) and is stopped.

    Raises:
        UserError: the temporary server does not start.
    """
    if has_server():
        yield
        return
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.server.api.server import SubprocessASGIServer

    prepare_database()
    server = SubprocessASGIServer()
    before = os.environ.get(ROOT_LEVEL)
    os.environ[ROOT_LEVEL] = before or "CRITICAL"  # only for the server
    try:
        server.start()
    except RuntimeError:
        raise _not_started() from None
    finally:
        if not before:
            del os.environ[ROOT_LEVEL]
    try:
        yield
    finally:
        hush()
        for worker in (EventsWorker, APILogWorker):
            worker.drain_all(timeout=ANSWERS)
        server.stop()


def hush() -> None:
    """Silence errors about a temporary server, which may have been ended together with the flow."""
    for name in TALK:
        logging.getLogger(name).setLevel(logging.CRITICAL)


def prepare_database() -> None:
    """Give the temporary server its own database: the user's may be of another version, damaged or unreadable.

    The file's name contains Prefect's version. Files of other versions are removed, and a damaged file is replaced. If
    the environment names a database (`DATABASES`), the server uses that one.
    """
    from prefect import __version__

    if any(map(os.environ.get, DATABASES)):
        return
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / f"prefect-{__version__}.db"
    sound = _is_sound(file)
    for other in FOLDER.glob("prefect-*.db*"):  # including SQLite's journal files
        if not sound or not other.name.startswith(file.name):
            other.unlink(missing_ok=True)
    os.environ[DATABASES[0]] = f"sqlite+aiosqlite:///{file}"


def _is_sound(file: Path) -> bool:
    try:
        with closing(sqlite3.connect(file)) as connection:
            return bool(connection.execute("PRAGMA quick_check").fetchone() == ("ok",))
    except sqlite3.OperationalError:  # it is in use
        return True
    except sqlite3.DatabaseError:
        return False


def _not_started() -> UserError:
    seconds = os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"]
    return UserError(
        f"Prefect's temporary server did not start in {seconds} seconds. If the machine is busy, increase "
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS. If the environment sets its database with "
        f"{' or '.join(DATABASES)}, check that the database is intact. `dvc repro` works without Prefect."
    )


def is_away(error: BaseException) -> bool:
    """Whether a flow failed because the Prefect server named by the user does not answer."""
    from httpx import HTTPStatusError, TransportError

    if not has_server():
        return False
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        if isinstance(cause, TransportError) or "Failed to reach API" in str(cause):
            return True
        if isinstance(cause, HTTPStatusError) and cause.response.status_code >= 500:
            return True
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    return False


def go_on_without(overrides: Sequence[str], until: str) -> NoReturn:
    """Start `unfreeze run` again in the place of this process, with a temporary Prefect server.

    Args:
        overrides: changes to `params.yaml`, used if the pass had not started yet.
        until: the last step to run.
    """
    from prefect.settings import PREFECT_API_URL

    print(
        f"unfreeze: Prefect's server at {mask(str(PREFECT_API_URL.value()))} does not answer. The run continues with a "
        "temporary one, and will not appear there.",
        file=sys.stderr,
        flush=True,
    )
    environment = os.environ | {"PREFECT_API_URL": ""}
    environment.pop(PARENT, None)  # the new process is the run itself, not a child of it
    if key := os.environ.get(PASS):
        environment[SAME_PASS], overrides = key, ()
    sys.stdout.flush()
    arguments = ["--until", until, *(word for override in overrides for word in ("-S", override))]
    os.execve(sys.executable, [sys.executable, "-m", "flows.cli", "run", *arguments], environment)
