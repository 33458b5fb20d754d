"""Comparison of a commit's pinned versions with those of the environment."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.environments import READY, _added, forget_old_environments, meets
from pipeline.process.lock import hold

NUMPY = importlib.metadata.version("numpy")


@pytest.mark.parametrize(
    ("pins", "dependencies", "met"),
    [
        (f"numpy=={NUMPY}", ["numpy"], True),
        (f"# pinned\nnumpy=={NUMPY}\nno-such-package==1", ["Numpy>=1"], True),  # not a dependency, not installed
        ("numpy==0.1", [], False),
        (f"numpy=={NUMPY}", ["no-such-package"], False),
        ('numpy==0.1; sys_platform == "nowhere"', [], True),
        ("", [], True),
    ],
)
def test_an_environment_meets_what_it_has(tmp_path: Path, pins: str, dependencies: list[str], met: bool) -> None:
    (tmp_path / "constraints.txt").write_text(pins)
    (tmp_path / "pyproject.toml").write_text(f"[project]\ndependencies = {dependencies}\n")
    assert meets(tmp_path) is met


def test_the_environment_of_these_tests_meets_the_project() -> None:
    assert meets(Path(__file__).parent.parent.parent)


def test_an_environment_that_is_made_has_the_extras_of_this_one(tmp_path: Path) -> None:
    """Packages of extras are added even if they are pinned. A worker may need them, for example for a remote on S3."""
    (tmp_path / "constraints.txt").write_text(f"numpy=={NUMPY}\npytest==1\nabsent==1\npillow==1")
    project = "[project]\ndependencies = []\n[project.optional-dependencies]\n"
    extras = "team = ['numpy[x]', 'absent', 'pillow; sys_platform == \"nowhere\"']\ndev = ['pytest']\n"
    (tmp_path / "pyproject.toml").write_text(project + extras)
    added = _added(tmp_path)
    assert "numpy[x]" in added and not {"absent", "pytest", "pillow", "numpy"} & set(added)
    assert not [text for text in added if "nowhere" in text]


def test_a_commit_that_asks_for_other_versions_gets_an_environment_once_until_it_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "constraints.txt").write_text("numpy==0.1")
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\nversion = '1'\ndependencies = []\n")
    code = """
import sys
from pathlib import Path
if "environments" in sys.prefix:
    print(sys.prefix, sys.path[1])
else:
    from flows import environments
    environments._added = lambda folder: []  # which would be fetched
    environments.use_environment(Path(sys.argv[1]))
"""
    environment = os.environ | {"UNFREEZE_HOME": str(tmp_path / "home"), "UV_OFFLINE": "1"}
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
        )
        said.append(done.stdout.split())
    (made,) = (tmp_path / "home/environments").glob("*/")
    assert said == [[str(made), str(tmp_path)]] * 2
    monkeypatch.setenv("UNFREEZE_HOME", str(tmp_path / "home"))
    forget_old_environments(60)
    assert made.exists()
    os.utime(made / READY, (0, 0))
    with hold(made.with_suffix(".lock")):  # a run is starting in it
        forget_old_environments(60)
    assert made.exists()
    forget_old_environments(60)
    assert not made.exists()
