"""The warm process: each step runs in a separate process, and ends with the process that waits for it."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.process.forkserver import ADDRESS, IMPORTS, LONGEST, warm_process

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only where a process can be forked safely"
)

STEP = """
import os, signal, sys, time
class Step:
    def main(self):
        print("here", os.environ["WORD"], os.getpid(), "torch" in sys.modules, flush=True)
        exec(os.environ["DO"])
ingest = Step()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project with a step that runs given code, and a warm process for it."""
    folder = tmp_path_factory.mktemp("warm")
    (folder / "tasks").mkdir()
    for name in ("__init__", "__main__"):
        (folder / "tasks" / f"{name}.py").write_text((Path("tasks") / f"{name}.py").read_text())
    (folder / "tasks" / "ingest.py").write_text(STEP)
    here = Path.cwd()
    os.chdir(folder)
    try:
        with warm_process():
            yield folder
    finally:
        os.chdir(here)


def start(folder: Path, do: str) -> subprocess.Popen[str]:
    environment = os.environ | {"WORD": "and now", "DO": do}
    return subprocess.Popen(
        [sys.executable, "-m", "tasks", "ingest"], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("do", "code", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("raise ValueError('of the step')", 1, "ValueError: of the step"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("print('later', file=sys.stderr)", 0, "later"),
    ],
)
def test_a_step_runs_warm_and_ends_as_it_would_alone(folder: Path, do: str, code: int, said: str) -> None:
    process = start(folder, do)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == code and said in output
    word, number, warm = output.split("\n")[0].removeprefix("here ").rsplit(" ", 2)
    assert word == "and now" and warm == "True" and int(number) != process.pid


def test_a_step_dies_with_whoever_waits_for_it(folder: Path) -> None:
    process = start(folder, "time.sleep(100)")
    assert process.stdout is not None
    number = int(process.stdout.readline().split()[-2])
    process.kill()
    process.wait()
    gone(number)
    assert start(folder, "pass").wait(180) == 0  # the next step still runs


def test_the_warm_process_and_its_step_die_with_the_flow(folder: Path) -> None:
    code = "import os, time, pipeline.process.forkserver as w\nwith w.warm_process():\n print(os.environ[w.ADDRESS], flush=True); time.sleep(99)"
    environment = {name: value for name, value in os.environ.items() if name != ADDRESS}
    flow = subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert flow.stdout is not None
    address = flow.stdout.readline().strip()
    children = psutil.Process(flow.pid).children()
    process = subprocess.Popen(
        [sys.executable, "-m", "tasks", "ingest"], cwd=folder, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"WORD": "", "DO": "time.sleep(100)", ADDRESS: address},
    )  # fmt: skip
    assert process.stdout is not None
    number = int(process.stdout.readline().split()[-2])
    flow.kill()
    flow.wait()
    gone(number, *(child.pid for child in children))
    assert process.wait(10) == 1


def test_the_folder_for_temporary_files_may_have_a_long_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address of a socket must not be long."""
    long = tmp_path / ("t" * 96)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.delenv(ADDRESS)
    with warm_process():
        assert len(os.environ[ADDRESS]) > LONGEST
        output, _ = start(folder, "pass").communicate(timeout=180)
        assert output.endswith("True\n")  # torch is already imported: the process is warm


def test_a_warm_process_in_the_block_of_another_is_the_same_one(folder: Path) -> None:
    address = os.environ[ADDRESS]
    with warm_process():
        assert os.environ[ADDRESS] == address
    assert os.environ[ADDRESS] == address


def test_without_a_warm_process_a_step_runs_in_its_own(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tasks", "ingest"], cwd=folder, stdout=subprocess.PIPE, text=True,
        env={k: v for k, v in os.environ.items() if k != ADDRESS} | {"WORD": "alone", "DO": "pass"},
    )  # fmt: skip
    output, _ = process.communicate(timeout=180)
    assert output.split()[:3] == ["here", "alone", str(process.pid)] and process.returncode == 0


def gone(*numbers: int) -> None:
    """Wait until all these processes have ended."""
    for _ in range(200):
        if not any(psutil.pid_exists(number) for number in numbers):
            return
        time.sleep(0.1)
    raise AssertionError(f"still there: {numbers}")


def test_what_is_imported_before_the_fork_asks_for_no_gpu() -> None:
    code = (
        "import importlib, torch\n"
        "def asked(*_): raise SystemExit('a GPU was asked for')\n"
        "torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = asked\n"
        f"for name in {IMPORTS!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
