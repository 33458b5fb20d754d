"""Overhead of Prefect, DVC and MLflow: a recipe with almost no work in its steps, and a run with nothing to do."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
DAY = 86_400
SMALL = {
    "data.image_size": "32",
    "backbone.name": "timm:test_efficientnet",
    "backbone.weights": "none",
    "lr_find.iterations": "20",
    "unfreeze_lr_find.iterations": "10",
    "train_head.epochs": "1",
    "train_augmented.cycles": "1",
    "train_full.cycles": "1",
    "evaluate.tta_views": "1",
}


def measure(say: Callable[[str], None], repeats: int) -> dict[str, Any]:
    """Seconds of each executed step's overhead and of the wait before its work, and of a pass with nothing to do."""
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base) / "project"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
        words = [word for key, value in SMALL.items() for word in ("-S", f"{key}={value}")]
        whole, log = _run(folder, "flows.cli", "run", *words)
        turns, work, begun = _turns(log), *_useful(folder)
        overheads = {step: seconds - work[step] for step, (_, seconds) in turns.items()}
        waits = {step: (begun[step] - turn) % DAY for step, (turn, _) in turns.items()}
        nothing = [_run(folder, "flows.cli", "run")[0] for _ in range(repeats)]
        repro = [_run(folder, "dvc", "repro")[0] for _ in range(repeats)]
    result = {
        "whole": whole,
        "useful": work,
        "overheads": overheads,
        "waits": waits,
        "overhead_per_step": sum(overheads.values()) / len(overheads),
        "flow_with_nothing_to_do": nothing,
        "dvc_repro_with_nothing_to_do": repro,
    }
    say(f"overhead per executed step: {result['overhead_per_step']:.1f} s, at most {max(overheads.values()):.1f} s")
    say(f"wait before a step's work starts: median {median(waits.values()):.1f} s, at most {max(waits.values()):.1f} s")
    say(f"a small recipe takes {whole:.1f} s, of which {sum(work.values()):.1f} s are the steps' own work")
    say(f"nothing to do: unfreeze run {median(nothing):.1f} s, dvc repro {median(repro):.1f} s")
    return result


def _run(folder: Path, *words: str) -> tuple[float, str]:
    unset = ("PREFECT_", "MLFLOW_", "UNFREEZE_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
    environment |= {
        "PREFECT_HOME": str(folder.parent / "prefect"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "DVC_NO_ANALYTICS": "1",
        "DO_NOT_TRACK": "1",
    }
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *words], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return time.perf_counter() - start, done.stdout + done.stderr


def _turns(log: str) -> dict[str, tuple[float, float]]:
    """For each step, start of its turn (in seconds since midnight) and duration (in seconds), from the flow's log.

    A turn starts when the previous step has ended; the turn of the first step starts when the flow begins.
    """
    ends = re.findall(
        r"^(\d+):(\d+):([\d.]+) \| .*?(?:Beginning flow|Task run '(\w+)' - Finished in state)", log, re.MULTILINE
    )
    at = [int(hours) * 3600 + int(minutes) * 60 + float(seconds) for hours, minutes, seconds, _ in ends]
    return {end[3]: (early, (late - early) % DAY) for end, early, late in zip(ends[1:], at, at[1:], strict=False)}


def _useful(folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Duration of each step's own function in seconds, and its start in seconds since midnight, from MLflow."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("unfreeze")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.`unfreeze.stage` != ''")
    named = {run.data.tags["unfreeze.stage"]: run for run in runs}
    began = {step: datetime.fromtimestamp(run.info.start_time / 1000) for step, run in named.items()}
    return (
        {step: run.data.metrics["seconds"] for step, run in named.items()},
        {step: (at - datetime.combine(at, datetime.min.time())).total_seconds() for step, at in began.items()},
    )
