"""The processes of a killed flow end with it. `tests.integration.soak` kills whole recipes, and takes longer."""

import signal
import time
from pathlib import Path

import pytest

from tests.integration.soak import at_work, begin, nothing_left, project

pytestmark = pytest.mark.long


def test_prefects_temporary_server_ends_with_a_flow_that_is_killed(tmp_path: Path) -> None:
    here = project(tmp_path / "killed")
    flow = begin(here, ("flows.cli", "run"))
    while not any("uvicorn" in process.cmdline() for process in at_work(here)):
        assert flow.poll() is None
        time.sleep(0.1)
    flow.send_signal(signal.SIGKILL)
    assert flow.wait() == -signal.SIGKILL
    nothing_left(here)
