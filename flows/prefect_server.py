"""Prefect's server is away: the pass goes on with a temporary one.

Prefect asks again for about a minute (`PREFECT_CLIENT_MAX_RETRIES`), and then gives up the flow. What is done is done: DVC
knows the steps, so the pass starts again in this process's place, without that server, and goes on at the step it was at.
"""

import os
import sys
from typing import NoReturn

from pipeline.process.secrets import mask
from pipeline.process.signals import PARENT
from pipeline.tracking.tracker import PASS

SAME_PASS = "UNFREEZE_SAME_PASS"
"""The key of the pass that goes on."""


def is_away(error: BaseException) -> bool:
    """Whether an error of a flow says that the Prefect server which the user has named does not answer."""
    from httpx import HTTPStatusError, TransportError
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
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


def go_on_without(until: str) -> NoReturn:
    """Start `unfreeze run` again in the place of this process, with a temporary Prefect server."""
    from prefect.settings import PREFECT_API_URL

    print(
        f"unfreeze: Prefect's server at {mask(str(PREFECT_API_URL.value()))} does not answer. The run goes on with a "
        "temporary one, and will not be seen there.",
        file=sys.stderr,
        flush=True,
    )
    environment = os.environ | {"PREFECT_API_URL": ""}
    environment.pop(PARENT, None)  # this process is nobody's
    if key := os.environ.get(PASS):
        environment[SAME_PASS] = key
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "flows.cli", "run", "--until", until], environment)
