"""A separate project for every test file."""

from collections.abc import Callable

import pytest

from tests.integration.project import Project
from tests.integration.project import make_project as make_project_in


@pytest.fixture(scope="module")
def make_project(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Project]:
    """Function that creates projects, each with its images beside it."""
    return lambda: make_project_in(tmp_path_factory.mktemp("work"))
