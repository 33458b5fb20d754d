"""Killed again and again, the recipe ends as if nothing had happened; `tests.integration.soak` does it at length."""

import random
from pathlib import Path

import pytest

from tests.integration.soak import soak


@pytest.mark.timeout(1200)
def test_killed_three_times_nothing_is_lost(tmp_path: Path) -> None:
    soak(tmp_path, 3, random.Random(5))
