"""`python -m tasks`, as DVC runs it."""

import subprocess
import sys

from tests.integration.project import ROOT


def test_a_python_that_lacks_the_libraries_is_told_in_a_sentence() -> None:
    """`-S` hides the installed packages, as with another `python` that is first in PATH."""
    command = [sys.executable, "-S", "-m", "tasks", "ingest"]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "not installed for" in done.stderr and ".venv/bin/activate" in done.stderr
