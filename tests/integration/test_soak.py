"""Killed again and again, the recipe ends as if nothing had happened; `tests.integration.soak` does it at length."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.integration.soak import at_work, begin, nothing_left, project, soak


@pytest.mark.timeout(1200)
def test_killed_nothing_is_lost(tmp_path: Path) -> None:
    soak(tmp_path, 1, random.Random(5))


def test_prefects_temporary_server_ends_with_a_flow_that_is_killed(tmp_path: Path) -> None:
    here = project(tmp_path / "killed")
    flow = begin(here, ("flows.cli", "run"))
    while not any("uvicorn" in process.cmdline() for process in at_work(here)):
        assert flow.poll() is None
        time.sleep(0.1)
    flow.send_signal(signal.SIGKILL)
    assert flow.wait() == -signal.SIGKILL
    nothing_left(here)
