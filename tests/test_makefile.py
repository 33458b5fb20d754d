"""Checks that the Makefile makes on its own folder."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("moved", [False, True])
def test_an_environment_that_was_made_in_another_folder_is_made_anew(tmp_path: Path, moved: bool) -> None:
    """The commands of such an environment run the code of the folder in which it was made."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    made_in = "/elsewhere" if moved else tmp_path
    (tmp_path / ".venv/pyvenv.cfg").write_text(f"home = /usr/bin\ncommand = /usr/bin/python3 -m venv {made_in}/.venv\n")
    (tmp_path / ".venv/.ready").touch()
    planned = subprocess.run(["make", "--dry-run", "run"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ("rm -rf .venv\n" in planned.stdout) == moved and ("-m venv .venv\n" in planned.stdout) == moved
