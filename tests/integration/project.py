"""A separate project for tests: the real tools on a few small images and a tiny network."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from unfreeze.settings.overrides import apply_overrides

ROOT = Path(__file__).parent.parent.parent
PARTS = (
    "unfreeze",
    "pipeline",
    "tasks",
    "flows",
    "params.yaml",
    "dvc.yaml",
    "prefect.yaml",
    "samples",
    ".dvc",
    ".dvcignore",
    ".gitignore",
)
SMALL = {
    "data.source": "../photos",
    "data.image_size": "32",
    "data.valid": "0.2",
    "backbone.name": "timm:test_efficientnet",
    "backbone.weights": "none",
    "batch_size": "8",
    "lr_find.iterations": "20",
    "unfreeze_lr_find.iterations": "12",
    "train_head.epochs": "1",
    "train_augmented.cycles": "1",
    "train_full.cycles": "1",
    "train_full.cycle_len": "1",
    "train_full.cycle_mult": "1",
    "evaluate.tta_views": "2",
}


@dataclass
class Project:
    """A checkout in a separate folder, methods to run commands in it, and the output of its first run."""

    folder: Path
    environment: dict[str, str]
    first: str = ""

    def run(self, *words: str, code: int | None = 0) -> str:
        """Run a Python module's command line; returns its output."""
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=500,
        )
        assert code is None or done.returncode == code, done.stdout
        return done.stdout

    def git(self, *words: str) -> str:
        """Run Git in the checkout; returns its output."""
        return subprocess.run(
            ["git", *words], cwd=self.folder, env=self.environment, check=True, capture_output=True, text=True
        ).stdout.strip()

    @property
    def mlflow(self) -> MlflowClient:
        """MLflow client for the checkout's own database."""
        return MlflowClient(f"sqlite:///{self.folder}/mlflow.db")

    def runs(self) -> tuple[list[Run], list[Run]]:
        """Parent and child runs in this database, newest first."""
        experiment = self.mlflow.get_experiment_by_name("unfreeze")
        assert experiment is not None
        found = list(self.mlflow.search_runs([experiment.experiment_id]))
        parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
        return parents, [run for run in found if "mlflow.parentRunId" in run.data.tags]

    def ran(self, output: str) -> list[str]:
        """Stages whose commands were run, according to DVC's output."""
        return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def paint(folder: Path, seed: int, count: int = 24) -> None:
    """Create images of two distinguishable classes: bright and dark images, with noise."""
    rng = np.random.default_rng(seed)
    for label, level in (("bright", 170), ("dark", 80)):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            pixels = rng.normal(level, 25, (40, 48, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i:02}.png")


def make_project(base: Path, settings: dict[str, str] = SMALL) -> Project:
    """Create a project in ``base/project``, under git, with its images in ``base/photos``."""
    folder = base / "project"
    folder.mkdir()
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "cache", "tmp", "config.local")
            shutil.copytree(source, folder / name, ignore=ignore)
        else:
            shutil.copy(source, folder / name)
    if not (base / "photos").exists():
        paint(base / "photos", 0)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "UNFREEZE_"))}
    environment |= {
        "PREFECT_HOME": str(base / "prefect"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # no processes for evaluating language models
        "DVC_NO_ANALYTICS": "1",
        "DO_NOT_TRACK": "1",
        "COLUMNS": "200",
    }
    project = Project(folder, environment)
    apply_overrides(folder / "params.yaml", [f"{key}={value}" for key, value in settings.items()])
    deployments = folder / "prefect.yaml"
    half_a_day_on = datetime.now(UTC) + timedelta(hours=12)  # else a test that runs at 2:00 UTC has a second run
    cron = f'cron: "0 {half_a_day_on.hour} * * *"'
    deployments.write_text(re.sub(r'cron: "[^"]*"', cron, deployments.read_text(encoding="utf-8")), encoding="utf-8")
    for words in (
        ("init", "-q", "-b", "main"),
        ("add", "-A"),
        ("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "start"),
    ):
        subprocess.run(["git", *words], cwd=folder, check=True, env=environment)
    return project
