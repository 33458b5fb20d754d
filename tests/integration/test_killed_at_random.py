"""Kill a whole recipe once at a random moment, and start it again. `tests.integration.soak` does this more often."""

import subprocess
import sys

import pytest

from tests.integration.project import ROOT


@pytest.mark.long
def test_a_recipe_that_is_killed_and_started_again_ends_as_if_it_had_not_been() -> None:
    command = [sys.executable, "-m", "tests.integration.soak", "--kills", "1", "--seed", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
