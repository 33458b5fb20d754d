"""Make a function a step of the recipe.

A step is a function in `tasks/<name>.py`. Its parameters name the sections of `params.yaml` that it reads, and
`dvc.yaml` lists the same ones; it returns its metrics, name -> number. Run as ``python -m tasks <name>`` by DVC, by
hand or in a debugger, it checks the settings, logs to MLflow, and writes ``artifacts/<name>/metrics.json``.
"""

import inspect
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline import scratch
from pipeline.artifacts import artifact, write_json
from pipeline.dvc_cache import TORN, drop_torn, settle
from pipeline.exit_codes import LESS_MEMORY, STOPPED, USER_ERROR, WORTH_A_RETRY, is_out_of_memory
from pipeline.mirror import Mirror, shared_place
from pipeline.process.lock import alone
from pipeline.process.secrets import mask
from pipeline.process.signals import GRACE, die_with, step_works_for, stop_when_asked
from pipeline.process.workspace import link_source
from pipeline.tracking.local_store import check_tracking_uri
from pipeline.tracking.sender import Unreachable
from pipeline.tracking.tracker import Tracker
from unfreeze.errors import TransientError, UserError, disk_trouble
from unfreeze.persistence.interruption import Interrupted, Interruption
from unfreeze.settings.schema import CheckpointSettings, Settings, flatten, load_settings

if TYPE_CHECKING:
    import torch

    from unfreeze.persistence.resumable import ResumableFile
    from unfreeze.training.checkpoints import Checkpoint

logger = logging.getLogger("unfreeze")

CHANGED = (
    "Its settings, code or inputs changed while the step ran, so DVC does not store its result: it would record it as "
    "computed from the changed ones. Start again to compute it again; or undo the change and start again, to use the "
    "computed result."
)
"""Message of a step whose settings, code or inputs changed while it ran."""


@dataclass(frozen=True)
class Run:
    """One execution of a step, passed to the step's function.

    Attributes:
        stage: name of the step.
        tracker: logs to MLflow.
        key: hash of everything that the step depends on: settings, images and code.
        often: when to write checkpoints.
        interruption: stop-request flag.
        wanted: the value of the setting `device`.
    """

    stage: str
    tracker: Tracker
    key: str
    often: CheckpointSettings
    interruption: Interruption
    wanted: str = "auto"

    def log(self, text: str, *values: object) -> None:
        """Log a message."""
        logger.info(text, *values)

    def path(self, name: str) -> Path:
        """Path of the step's output file with this name."""
        return artifact(self.stage, name)

    @cached_property
    def scratch(self) -> Path:
        """Folder of checkpoints, kept for the next execution with the same settings, images and code."""
        folder = scratch.ROOT / self.stage / self.key
        scratch.clear_foreign(folder)
        return folder

    @cached_property
    def mirror(self) -> Mirror | None:
        """Copies the checkpoints of trainings to the shared location, if there is one."""
        place = shared_place(self.often.share)
        return Mirror(self.scratch, place) if place else None

    @cached_property
    def device(self) -> "torch.device":
        """The device that the step computes on. Raises UserError if the setting's device does not work."""
        from unfreeze.device import choose_device, describe

        device = choose_device(self.wanted)
        self.log("on %s", describe(device))
        return device

    @property
    def _computed(self) -> str:
        """Kind of device and version of torch, which affect the last bits of a result."""
        import torch

        return f"{self.device.type} {torch.__version__}"

    def checkpoint(self, name: str = "training") -> "Checkpoint":
        """The checkpoint of a training of this step."""
        from unfreeze.training.checkpoints import Checkpoint

        path, key = self.scratch / f"{name}.safetensors", f"{self.key} {self._computed}"
        checkpoint = Checkpoint(path, key, self.often.seconds, self.often.batches, self.interruption)
        if self.mirror:
            checkpoint.written = self.mirror.changed
            if self.mirror.fetch(checkpoint):
                self.log("continuing from another machine's checkpoint at %s", mask(self.mirror.address))
        return checkpoint

    def predictions(self, name: str, *depends: str) -> "ResumableFile":
        """A `resumable` file of network outputs, which also depends on the kind of device and the version of torch."""
        return self.resumable(name, self._computed, *depends)

    def resumable(self, name: str, *depends: str) -> "ResumableFile":
        """A file that is written piece by piece and resumed after an interruption, as a context manager.

        Args:
            name: name of the file.
            depends: further values that its content depends on, besides settings, images and code.
        """
        from unfreeze.persistence.resumable import ResumableFile

        return ResumableFile(self.scratch / name, " ".join((self.key, *depends)), self.often.seconds)

    def close(self) -> None:
        """Wait until the last checkpoint is copied to the shared location, if there is one."""
        if mirror := vars(self).get("mirror"):  # only trainings create one
            mirror.close()

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
        """Run the step in this process. A user error ends it with code 2 and a message (`pipeline.exit_codes`)."""
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
        logging.getLogger().handlers[0].addFilter(masked)
        logger.setLevel(logging.INFO)
        interruption = Interruption()
        stop_when_asked(interruption)
        die_with(step_works_for())
        try:
            # After an immediate restart, the stopped execution may still be writing its last checkpoint.
            with alone("step", GRACE):
                self._run(interruption)
        except (TransientError, Unreachable) as error:
            self._end(str(error), WORTH_A_RETRY)
        except UserError as error:
            self._end(str(error), USER_ERROR)
        except Interrupted:
            self._end("stopped. When started again, it continues from its last checkpoint.", STOPPED)
        except (OSError, MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                self._end(f"Memory ran out. {LESS_MEMORY}", WORTH_A_RETRY)
            if isinstance(error, OSError) and (sentence := disk_trouble(error, artifact(self.name, ""))):
                self._end(sentence, USER_ERROR)
            raise

    def _end(self, sentence: str, code: int) -> NoReturn:
        print(f"{self.name}: {mask(sentence)}", file=sys.stderr, flush=True)
        sys.exit(code)

    def _run(self, interruption: Interruption) -> None:
        check_tracking_uri()
        settings, chosen, key = self._depends()
        torn = drop_torn()
        for path in torn:
            logger.warning(TORN, path)
        settle()
        if torn:
            # This happens only without a flow (with `dvc repro`, for example): a flow has already called `drop_torn`.
            self._end("DVC may have restored incomplete files as this step's inputs: start again.", WORTH_A_RETRY)
        artifact(self.name, "").mkdir(parents=True, exist_ok=True)
        link_source(settings.data.source)
        tracker = Tracker(self.name, flatten(settings), flatten(chosen))
        scratch.clear_earlier(self.name)
        run = Run(self.name, tracker, key, settings.checkpoint, interruption, settings.device)
        status, metrics, start = "FAILED", {}, time.perf_counter()
        try:
            metrics = {k: float(v) for k, v in self.function(run, **chosen).items()}
            if self._depends()[2] != key:  # DVC would record the current files as the step's inputs
                raise UserError(CHANGED)
            write_json(artifact(self.name, "metrics.json"), metrics)
            status = "FINISHED"
        except (Interrupted, KeyboardInterrupt):
            status = "KILLED"
            raise
        finally:
            run.close()
            tracker.close(status, metrics, time.perf_counter() - start)

    def _depends(self) -> tuple[Settings, dict[str, Any], str]:
        """The current settings, the sections that the step reads, and the hash of everything that it depends on."""
        settings = load_settings()
        chosen = {section: getattr(settings, section) for section in self.sections}
        return settings, chosen, scratch.fingerprint(self.name, flatten(chosen))


def step(function: Callable[..., Mapping[str, float]]) -> Step:
    """Make a function a step: ``function(run, <sections of params.yaml>...) -> metrics``."""
    run, *sections = inspect.signature(function).parameters
    return Step(function.__name__, function, tuple(sections))


def masked(record: logging.LogRecord) -> bool:
    """Mask a log record; keep it."""
    record.msg, record.args = mask(record.getMessage()), ()
    return True
