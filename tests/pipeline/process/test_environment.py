"""The defaults of the environment are there before the libraries that read them only once."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent.parent


def test_a_step_knows_how_long_threads_wait_before_torch_is_imported(tmp_path: Path) -> None:
    """`dvc repro` starts steps without anything of ours around them."""
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
