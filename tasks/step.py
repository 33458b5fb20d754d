"""What makes a function a step of the recipe.

A step is a function in a file of its own, `tasks/<name>.py`. Its parameters name the sections of `params.yaml` that it
reads, and `dvc.yaml` lists just these; it returns its metrics, name -> number. Run as ``python -m tasks <name>`` by DVC,
by hand or by a debugger, it checks the settings, seeds chance, tells MLflow, and writes
``artifacts/<name>/metrics.json``.
"""

import inspect
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.environment import artifact, set_environment
from tasks.masking import mask
from tasks.publishing import Unreachable
from tasks.tracking import Tracker
from unfreeze.errors import UserError
from unfreeze.settings import flatten, load_settings

logger = logging.getLogger("unfreeze")

USER_ERROR = 2
"""Exit code of a step that ended with a `UserError`: nothing that a retry would mend."""


@dataclass(frozen=True)
class Run:
    """One execution of a step, as the step's function sees it."""

    stage: str
    tracker: Tracker

    def log(self, text: str, *values: object) -> None:
        """A line for people."""
        logger.info(text, *values)

    def path(self, name: str) -> Path:
        """Where the step writes a file of this name."""
        return artifact(self.stage, name)

    def read_metrics(self, stage: str) -> dict[str, float]:
        """The metrics of an earlier step."""
        return dict(json.loads(artifact(stage, "metrics.json").read_text()))


@dataclass(frozen=True)
class Step:
    """A function that is a step, with the names of the settings that it reads."""

    name: str
    function: Callable[..., Mapping[str, float]]
    sections: tuple[str, ...]

    def main(self) -> None:
        """Run the step in this process, which ends with code 2 and a sentence when the user has to mend something."""
        set_environment()
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
        logging.getLogger().handlers[0].addFilter(masked)
        logger.setLevel(logging.INFO)
        try:
            self._run()
        except UserError as error:
            print(f"{self.name}: {mask(str(error))}", file=sys.stderr, flush=True)
            sys.exit(USER_ERROR)
        except Unreachable as error:
            print(f"{self.name}: {error}", file=sys.stderr, flush=True)
            sys.exit(1)  # worth a retry

    def _run(self) -> None:
        settings = load_settings()
        chosen = {section: getattr(settings, section) for section in self.sections}
        artifact(self.name, "").mkdir(parents=True, exist_ok=True)
        tracker = Tracker(self.name, flatten(settings), flatten(chosen))
        metrics, start = None, time.perf_counter()
        try:
            metrics = {k: float(v) for k, v in self.function(Run(self.name, tracker), **chosen).items()}
            write_json(artifact(self.name, "metrics.json"), metrics)
        finally:
            tracker.close(metrics, time.perf_counter() - start)


def step(function: Callable[..., Mapping[str, float]]) -> Step:
    """Make a function a step: ``function(run, <sections of params.yaml>...) -> metrics``."""
    run, *sections = inspect.signature(function).parameters
    return Step(function.__name__, function, tuple(sections))


def masked(record: logging.LogRecord) -> bool:
    """Mask a log record; keep it."""
    record.msg, record.args = mask(record.getMessage()), ()
    return True


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    os.replace(partial, path)
