"""Kill the recipe at random moments, start it again, and check that nothing is lost.

    python -m tests.integration.soak --kills 50
    python -m tests.integration.soak --kills 20 --power    # cut the power; needs the right to mount a disk

The recipe first runs undisturbed on a part of the sample. It then runs again in a second project. There, one process or
all processes repeatedly get SIGKILL, SIGTERM or Ctrl-C. Each time, no process may be left running. At the end, weights,
DVC's state and MLflow's curves must be the same as after the undisturbed run. The command that starts the recipe is
random, too.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from mlflow import MlflowClient
from mlflow.entities import Run

from pipeline import dvc_cache
from pipeline.artifacts import STAGES
from tests.disk import Disk
from tests.integration.project import SMALL, Project, make_project
from unfreeze.data.samples import elpv

SETTINGS = SMALL | {
    "data.image_size": "64",
    "train_head.epochs": "3",
    "train_augmented.cycles": "2",
    "train_full.cycles": "3",
    "checkpoint.seconds": "0",
    "checkpoint.batches": "5",
}
DOORS = (("flows.cli", "run"), ("dvc", "repro"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
GONE_WITHIN = 120.0
"""Seconds within which all processes of a killed run must end."""


def main() -> None:
    """Run the soak test; exits with an error message if something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--power", action="store_true", help="cut the power of the disk that the project lies on")
    chosen = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"in {base}, which stays if something is lost", flush=True)
    disk = Disk(base / "machine", 1024) if chosen.power else None
    soak(base, chosen.kills, random.Random(chosen.seed), disk)
    if disk is not None:
        disk.remove()
    shutil.rmtree(base)


def soak(base: Path, kills: int, chance: random.Random, disk: Disk | None = None) -> None:
    """Kill ``kills`` times, in as many passes as necessary, and check each pass that finishes.

    The time until a kill is random, and shorter if fewer steps are left. With ``disk``, the project is on this disk:
    each time, all processes are killed, and the disk loses the data that it had not written yet.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # otherwise a shell's background jobs ignore Ctrl-C
    calm, wild = project(base / "calm"), project((disk.folder if disk else base) / "wild")
    start = time.monotonic()
    calm.run("flows.cli", "run")
    length = time.monotonic() - start
    expected = weights(calm)
    print(f"undisturbed: {length:.0f} s", flush=True)
    done = passes = 0
    since = time.time()
    while done < kills:
        door = chance.choice(DOORS)
        process = begin(wild, door)
        # Even a pass with nothing left to do takes some time to start.
        moment = chance.uniform(0, length * (1 - 0.7 * done_so_far(wild)))
        try:
            code = process.wait(moment)
        except subprocess.TimeoutExpired:
            done += 1
            struck = cut(wild, process, disk) if disk else strike(wild, process, chance)
            print(f"{done}: {' '.join(door)} after {moment:.1f} s, {struck}", flush=True)
            code = process.wait(GONE_WITHIN)
            if disk or chance.random() < 0.7:
                nothing_left(wild)  # otherwise restart at once, as a supervisor might
            if done < kills and code:
                continue
        if code:
            nothing_left(wild)
            wild.run("flows.cli", "run")  # recovers from kills that `dvc repro` does not recover from
        passes += 1
        check(wild, expected, since)
        print(f"pass {passes} came to its end after {done} kills: weights, DVC and MLflow agree", flush=True)
        forget(wild)
        since = time.time()


def project(base: Path) -> Project:
    """A project with 160 photographs of the sample."""
    by_label: dict[str, list[Path]] = {}
    for file, _, label in elpv():
        by_label.setdefault(label, []).append(file)
    for label, files in by_label.items():
        (base / "photos" / label).mkdir(parents=True)
        for file in files[:80]:
            shutil.copy(file, base / "photos" / label)
    return make_project(base, SETTINGS)


def begin(wild: Project, door: tuple[str, str]) -> subprocess.Popen[bytes]:
    """Start the recipe in a separate session, as a terminal would."""
    log = (wild.folder.parent / "log.txt").open("ab")
    return subprocess.Popen(
        [sys.executable, "-m", *door], cwd=wild.folder, env=wild.environment, stdout=log, stderr=log,
        start_new_session=True,
    )  # fmt: skip


def at_work(wild: Project) -> Iterator[psutil.Process]:
    """All processes that run in the project's folder."""
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == wild.folder and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except (psutil.Error, OSError):
            continue


def done_so_far(wild: Project) -> float:
    """Share of the steps that this pass has finished."""
    return sum((wild.folder / "artifacts" / stage / "metrics.json").exists() for stage in STAGES) / len(STAGES)


def strike(wild: Project, process: subprocess.Popen[bytes], chance: random.Random) -> str:
    """Send a signal to one of the run's processes, or to all as a terminal does; returns a description."""
    number = chance.choice(SIGNALS)
    everyone = list(at_work(wild))
    one = chance.choice(everyone) if everyone and chance.random() < 0.7 else None
    try:
        name = "everything" if one is None else " ".join(one.cmdline()[1:5])
        if one is None:
            os.killpg(process.pid, number)
        else:
            one.send_signal(number)
        if one is None or one.pid != process.pid:
            time.sleep(chance.uniform(0, 2))
            process.send_signal(signal.SIGTERM)  # otherwise a flow would start its step again
    except (psutil.NoSuchProcess, ProcessLookupError):
        name = "what was gone already"
    return f"{number.name} to {name}"


def cut(wild: Project, process: subprocess.Popen[bytes], disk: Disk) -> str:
    """Cut the power; returns a description."""
    killed = [process, *at_work(wild)]
    for one in killed:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    nothing_left(wild)
    while any(psutil.pid_exists(one.pid) for one in killed):
        time.sleep(0.1)
    disk.cut()
    note = wild.folder / dvc_cache.NOTE
    if note.exists():  # simulate a restart of the machine
        note.write_text(json.dumps(json.loads(note.read_text()) | {"boot": "another"}))
    return "the power failed"


def nothing_left(wild: Project) -> None:
    """Wait until no process of the run is left. Raises SystemExit after ``GONE_WITHIN`` seconds."""
    end = time.monotonic() + GONE_WITHIN
    while left := list(at_work(wild)):
        if time.monotonic() > end:
            sys.exit("left running: " + "; ".join(f"{p.pid} {' '.join(p.cmdline())}" for p in left))
        time.sleep(0.2)


def weights(of: Project) -> dict[str, str]:
    """Digests of all files of weights, and of the predictions."""
    found = [p for name in ("*.safetensors", "predictions.csv") for p in (of.folder / "artifacts").rglob(name)]
    return {str(path.relative_to(of.folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def check(wild: Project, expected: dict[str, str], since: float) -> None:
    """Raises AssertionError if weights, DVC or MLflow differ from those of an undisturbed run.

    MLflow's records of earlier passes, from before ``since`` (seconds since 1970), are ignored.
    """
    assert weights(wild) == expected
    status = wild.run("dvc", "status")
    assert "up to date" in status, status
    # Use a copy: MLflow caches a connection by name, and after a power loss it would refer to the old file.
    runs_now = wild.folder.parent / f"mlflow-{time.monotonic_ns()}.db"
    shutil.copy(wild.folder / "mlflow.db", runs_now)
    mlflow = MlflowClient(f"sqlite:///{runs_now}")
    experiment = mlflow.get_experiment_by_name("unfreeze")
    assert experiment is not None
    started = f"attributes.start_time >= {int(since * 1000)}"
    runs = mlflow.search_runs([experiment.experiment_id], started, max_results=1000)
    for stage in STAGES:
        finished = [r for r in runs if r.info.run_name == stage and r.info.status == "FINISHED"]
        assert finished, f"no finished run of {stage}"
        for run in finished:
            check_curves(mlflow, run, wild.folder / "artifacts" / stage)
    assert len(mlflow.search_model_versions("name = 'unfreeze'")) == 1, "the same weights, registered more than once"
    running = [dict(r.info) | r.data.tags for r in runs if r.info.status == "RUNNING"]
    assert not running, f"nobody works at what is RUNNING: {running}"
    failed = [r.info.run_name for r in runs if r.info.status == "FAILED" and r.info.run_name in STAGES]
    assert not failed, f"not killed, but failed: {failed}"
    assert not list((wild.folder / ".unfreeze/checkpoints").rglob("*.partial"))


def check_curves(mlflow: MlflowClient, run: Run, artifacts: Path) -> None:
    """Raises AssertionError if a finished step's curve has gaps or duplicates, or is not as long as the step's table.

    `retrain` has a curve for each of its trainings, and a table of the last one.
    """
    table = [file for name in ("batches.csv", "curve.csv") if (file := artifacts / name).exists()]
    names = [name for name in run.data.metrics if name.rpartition("/")[2] in ("loss", "rate")]
    assert bool(names) == bool(table), (run.info.run_name, names)
    lengths = set()
    for name in names:
        steps = sorted(point.step for point in mlflow.get_metric_history(run.info.run_id, name))
        assert steps == list(range(len(steps))), (run.info.run_name, name, steps)
        lengths.add(len(steps))
    if table:
        assert len(table[0].read_text().splitlines()) - 1 in lengths, (run.info.run_name, lengths)


def forget(wild: Project) -> None:
    """Delete everything of the pass except MLflow's records, so that the next pass starts from the beginning."""
    for name in ("artifacts", ".dvc/cache", ".dvc/tmp", ".unfreeze"):
        shutil.rmtree(wild.folder / name, ignore_errors=True)
    (wild.folder / "dvc.lock").unlink(missing_ok=True)
    os.sync()  # otherwise some files would be back after the next power cut


if __name__ == "__main__":
    main()
