"""Processes left by a killed run are ended. No reader of the output waits for the process that ends them."""

import subprocess
import sys
import time

import psutil

from pipeline.process.signals import alive, identity

CODE = """
import subprocess, sys, time
from pipeline.process import orphans
orphans.GRACE = float(sys.argv[1])
orphans.leave_none()
left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.DEVNULL)
print(left.pid, flush=True)
sys.stdin.read()
"""


def begin(grace: float) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, str(grace)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, identity(psutil.Process(int(process.stdout.readline())))


def test_what_a_killed_run_started_is_ended() -> None:
    process, left = begin(0.2)
    time.sleep(2)
    assert alive(left)  # while the run is alive
    process.kill()
    process.communicate()
    end = time.monotonic() + 20
    while alive(left) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive(left)


def test_it_has_its_time_to_end_by_itself_and_a_reader_of_the_output_does_not_wait_for_that() -> None:
    process, left = begin(100)
    start = time.monotonic()
    process.communicate()  # until no process has the output open
    assert process.returncode == 0
    assert time.monotonic() - start < 10
    time.sleep(2)
    assert alive(left)
    psutil.Process(int(left.partition("-")[0])).kill()
