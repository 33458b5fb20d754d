"""Environment variables get their defaults before the import of libraries that read them only once."""

import getpass
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.process.environment import name_user, set_prefect_home

ROOT = Path(__file__).parent.parent.parent.parent


def test_a_step_knows_how_long_threads_wait_before_torch_is_imported(tmp_path: Path) -> None:
    """`dvc repro` starts steps directly, without our code around them."""
    code = (
        "import runpy, sys, os\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            print('spins', os.environ.get('GOMP_SPINCOUNT'))\n"
        "            sys.exit(0)\n"
        "sys.meta_path.insert(0, Watch())\n"
        "sys.argv = ['tasks', 'train_full']\n"
        "runpy.run_module('tasks', run_name='__main__')\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"} | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.stdout == "spins 30000\n", found.stderr


def test_a_command_in_a_notebook_does_not_need_the_notebooks_backend(tmp_path: Path) -> None:
    code = "from pipeline.process.environment import set_environment as s; s(); import unfreeze.reports.plots"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_a_terminal_cannot_show_is_shown_escaped(tmp_path: Path) -> None:
    code = "from pipeline.process.environment import set_environment as s; s(); print('schwärzlich 明')"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "schw\\xe4rzlich \\u660e\n", done.stderr


def test_names_of_files_are_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "flows.cli", "predict", "明"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.stderr.decode() == "unfreeze: 明 does not exist.\n" and done.returncode == 2


def python(code: str, *shell: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run Python code after `set_environment`, from a shell that can close standard streams (``2>&-``)."""
    code = f"from pipeline.process.environment import *; set_environment(); {code}"
    command = ["sh", "-c", f'exec "$0" -c "$1" {" ".join(shell)}', sys.executable, code]
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, env=variables, capture_output=True, text=True)


def test_where_output_is_closed_nothing_else_gets_it(tmp_path: Path) -> None:
    """In Python, a closed stream is None. A C library would write to the next opened file, which gets descriptor 2."""
    code = (
        f"file = open({str(tmp_path / 'file')!r}, 'w'); print(sys.stderr.isatty(), file=sys.stderr, flush=True); "
        "os.write(2, b'of C'); print('out')"
    )
    done = python(code, "2>&-")
    assert (done.returncode, done.stdout) == (0, "out\n")
    assert (tmp_path / "file").read_text() == ""
    done = python("print('said', file=sys.stderr); print(sys.stdin.read())", "<&-", ">&-")
    assert (done.returncode, done.stderr) == (0, "said\n")


def test_a_variable_that_is_empty_counts_as_not_set() -> None:
    assert python("print(os.environ['MLFLOW_TRACKING_URI'])", MLFLOW_TRACKING_URI="").stdout == "sqlite:///mlflow.db\n"
    assert python("print(os.environ['MLFLOW_TRACKING_URI'])", MLFLOW_TRACKING_URI="x").stdout == "x\n"


def test_a_user_id_without_a_name_gets_one_and_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54_321)  # mocked: this user could not read the interpreter
    name_user()
    assert getpass.getuser() == "54321" and Path.home() == tmp_path
    name_user()
    monkeypatch.setenv("HOME", "/home/of/image")
    name_user()
    assert Path.home() == Path("/home/of/image")


def test_where_prefects_folder_cannot_be_written_it_has_one_in_the_workspace(
    as_nobody: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(as_nobody)
    closed = as_nobody / "closed"
    closed.mkdir()
    for home in (closed / ".prefect", as_nobody / "home/.prefect"):
        monkeypatch.setenv("PREFECT_HOME", str(home))
        monkeypatch.delenv("PREFECT_PROFILES_PATH", raising=False)
        set_prefect_home()
        assert os.environ["PREFECT_HOME"] == str(home)  # Prefect creates it
    closed.chmod(0o555)
    for home in (closed, closed / "below/.prefect"):
        monkeypatch.setenv("PREFECT_HOME", str(home))
        monkeypatch.delenv("PREFECT_PROFILES_PATH", raising=False)
        set_prefect_home()
        assert os.environ["PREFECT_HOME"] == str(as_nobody / ".unfreeze/prefect")
        assert os.environ["PREFECT_PROFILES_PATH"] == str(home / "profiles.toml")
