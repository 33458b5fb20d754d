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
