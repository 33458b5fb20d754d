"""`unfreeze sweep`: a search over settings with Optuna.

Each trial is a run of the recipe up to `evaluate`, rated on validation images. Trials share DVC's cache, so that
steps that do not depend on a searched setting run once. The study is kept in a database: after a restart, the search
and its interrupted trials continue.
"""

import hashlib
import itertools
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import optuna
import yaml
from optuna.trial import TrialState
from rich.console import Console
from rich.table import Table

from flows.trials import DeployedTrials, LocalTrials, Trial
from pipeline.process.secrets import mask
from pipeline.tracking.recorded import course_of, prepare_experiment
from pipeline.tracking.sender import Unreachable
from unfreeze.errors import UserError
from unfreeze.settings.overrides import as_overrides, with_overrides
from unfreeze.settings.schema import load_settings, parse_section, parse_text, read_text
from unfreeze.settings.validation import In, OneOf
from unfreeze.settings.yaml_loader import read_yaml

ROOT = Path(".unfreeze/sweep")
STORAGE = "UNFREEZE_SWEEP_STORAGE"
"""Environment variable: SQLAlchemy URL of Optuna's storage; by default an SQLite file in `ROOT`."""
PAUSE = 2.0
"""Seconds between two checks of the trials."""
PATIENCE = 60.0
"""Seconds to wait after a trial's end for its last metrics to arrive in MLflow."""
SAME = 20
"""Number of consecutive suggestions of already tried settings after which the search ends."""


@dataclass(frozen=True)
class SweepSettings:
    """Options of a search; `sweep.yaml` documents each key."""

    trials: Annotated[int, In(1, 100_000)]
    metric: str
    direction: Annotated[str, OneOf(("minimize", "maximize"))]
    sampler: Annotated[str, OneOf(("tpe", "random", "grid"))]
    prune: bool
    parallel: Annotated[int, In(1, 1000)]
    deployment: str | None


@dataclass(frozen=True)
class Range:
    """A range of numbers; integers if both ends are integers."""

    low: float
    high: float
    log: bool = False


Space = dict[str, list[Any] | Range]


@dataclass
class AtWork:
    """A running trial: Optuna's trial, our process or flow run, its worktree, and the number of reported cycles."""

    optuna: optuna.trial.Trial
    trial: Trial
    slot: int
    cycles: int = 0


def read_sweep(path: Path) -> tuple[SweepSettings, Space]:
    """Read the options and the search space.

    Raises:
        UserError: the file is missing or invalid, a key is not a setting, or a value is not valid for its setting.
    """
    content = read_yaml(read_text(path), str(path))
    if not isinstance(content, Mapping) or not isinstance(content.get("settings"), Mapping) or not content["settings"]:
        raise UserError(f"{path} must be a mapping with a key `settings`, the search space.")
    chosen = parse_section(SweepSettings, {k: v for k, v in content.items() if k != "settings"}, "", str(path))
    split, _, _ = chosen.metric.partition("/")
    if split != "evaluate" or not chosen.metric.startswith("evaluate/valid_"):
        raise UserError(
            f"{path}: metric is {chosen.metric!r}, but must be one of evaluate/valid_...: test images must not be used "
            "to choose."
        )
    space = {str(key): _space(str(key), value, path) for key, value in content["settings"].items()}
    if chosen.sampler == "grid" and (ranges := [key for key, values in space.items() if isinstance(values, Range)]):
        raise UserError(f"{path}: sampler grid takes only lists of values, but {', '.join(ranges)} is a range.")
    for values in space.values():  # check all values now: one that is refused later would waste the trials before it
        for value in values if isinstance(values, list) else (values.low, values.high):
            key = next(key for key, those in space.items() if those is values)
            parse_text(with_overrides("params.yaml", as_overrides({key: value})), f"params.yaml with {key}={value}")
    return chosen, space


def _space(key: str, value: Any, path: Path) -> list[Any] | Range:
    if isinstance(value, list) and value:
        return value
    if isinstance(value, Mapping) and {"low", "high"} <= value.keys() <= {"low", "high", "log"}:
        found = Range(value["low"], value["high"], value.get("log", False))
        numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in (found.low, found.high))
        if numbers and found.low < found.high and isinstance(found.log, bool) and not (found.log and found.low <= 0):
            return found
    raise UserError(
        f"{path}: {key} must be a list of values, or a range such as {{low: 0.001, high: 0.1, log: true}}; with log above 0."
    )


def sweep(path: Path) -> int:
    """Run a search, print its results, and write the best settings to a file; returns the exit code.

    Raises:
        UserError: the file is wrong, or trials cannot be started.
    """

    chosen, space = read_sweep(path)
    settings = load_settings()
    name = f"{path.stem}-{_digest(path, Path('params.yaml'))}"
    folder = ROOT / name
    folder.mkdir(parents=True, exist_ok=True)
    study = _study(name, chosen, space, settings.seed)
    trials: LocalTrials | DeployedTrials
    if chosen.deployment:
        trials = DeployedTrials(name, chosen.deployment)
    else:
        prepare_experiment()
        trials = LocalTrials(name, folder, settings)
    print(
        f"Search {name}: {chosen.trials} trials, each a run with the tag unfreeze.sweep = {name} in MLflow.", flush=True
    )
    at_work: list[AtWork] = []
    try:
        _search(study, chosen, space, trials, at_work)
    except BaseException:
        for one in at_work:
            if not chosen.deployment:  # a deployment's trial continues, and is found again after a restart
                one.trial.stop()
        raise
    trials.close()
    return _conclude(study, chosen, folder)


def _study(name: str, chosen: SweepSettings, space: Space, seed: int) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler: optuna.samplers.BaseSampler
    if chosen.sampler == "tpe":
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=chosen.parallel > 1)
    else:
        sampler = optuna.samplers.RandomSampler(seed)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=4) if chosen.prune else optuna.pruners.NopPruner()
    study = optuna.create_study(
        study_name=name,
        storage=os.environ.get(STORAGE) or f"sqlite:///{ROOT}/studies.db",
        sampler=sampler,
        pruner=pruner,
        direction=optuna.study.StudyDirection[chosen.direction.upper()],
        load_if_exists=True,
    )
    if chosen.sampler == "grid":  # Optuna's GridSampler works only in `Study.optimize`: it calls `Study.stop`
        values = [those for those in space.values() if isinstance(those, list)]
        for combination in itertools.product(*values):
            study.enqueue_trial(dict(zip(space, combination, strict=True)), skip_if_exists=True)
    return study


def _search(
    study: optuna.Study,
    chosen: SweepSettings,
    space: Space,
    trials: LocalTrials | DeployedTrials,
    at_work: list[AtWork],
) -> None:
    """Run trials until their number is reached, or nothing is left to try; ``at_work`` lists the running ones."""
    left = [trial for trial in study.trials if trial.state == TrialState.RUNNING]
    for frozen in left:  # trials of a search that was killed
        _begin(study, frozen._trial_id, trials, at_work)
    while True:
        done = study.get_trials(False, (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
        counted = [trial for trial in done if "same" not in trial.user_attrs]
        while len(at_work) < chosen.parallel and len(counted) + len(at_work) < chosen.trials:
            if (trial := _suggest(study, space)) is None:
                break
            _begin(study, trial._trial_id, trials, at_work)
        if not at_work:
            return
        time.sleep(PAUSE)
        for one in list(at_work):
            if _look(study, chosen, one):
                at_work.remove(one)


def _suggest(study: optuna.Study, space: Space) -> optuna.trial.Trial | None:
    """The next trial with settings that have not been tried; None after `SAME` suggestions that have been."""
    for _ in range(SAME):
        tried = [trial.params for trial in study.trials if "same" not in trial.user_attrs and trial.params]
        trial = study.ask()
        for key, values in space.items():
            if isinstance(values, list):
                trial.suggest_categorical(key, values)
            elif isinstance(values.low, int) and isinstance(values.high, int):
                trial.suggest_int(key, values.low, values.high, log=values.log)
            else:
                trial.suggest_float(key, values.low, values.high, log=values.log)
        if trial.params not in tried:
            return trial
        trial.set_user_attr("same", True)
        study.tell(trial, state=TrialState.FAIL)
    return None


def _begin(study: optuna.Study, id_: int, trials: LocalTrials | DeployedTrials, at_work: list[AtWork]) -> None:
    """Start one of Optuna's trials, or resume it."""
    trial = optuna.trial.Trial(study, id_)
    slot = trial.user_attrs.get("slot")
    if slot is None:
        slot = next(number for number in itertools.count() if number not in {one.slot for one in at_work})
        trial.set_user_attr("slot", slot)
    ours = trials.start(trial.number, slot, trial.params, trial.user_attrs.get("flow run"))
    if isinstance(trials, DeployedTrials):
        trial.set_user_attr("flow run", getattr(ours, "id", None))
    print(f"trial {trial.number + 1}: {_shown(trial.params)}", flush=True)
    at_work.append(AtWork(trial, ours, slot))


def _look(study: optuna.Study, chosen: SweepSettings, one: AtWork) -> bool:
    """Check a trial's progress, and stop it if Optuna prunes it; returns whether it has ended."""
    ended = one.trial.ended()
    number = f"trial {one.optuna.number + 1}"
    if ended is None:
        if chosen.prune and _is_poor(chosen, one):
            one.trial.stop()
            study.tell(one.optuna, state=TrialState.PRUNED)
            print(f"{number}: stopped after cycle {one.cycles}, with a loss worse than the median", flush=True)
            return True
        return False
    value = _value(chosen.metric, one.trial.key) if ended else None
    if value is None:
        study.tell(one.optuna, state=TrialState.FAIL)
        why = f"MLflow has no {chosen.metric} for it" if ended else "failed"
        print(f"{number}: {why}", flush=True)
        return True
    study.tell(one.optuna, value)
    print(f"{number}: {chosen.metric} {value:.4f}", flush=True)
    return True


def _is_poor(chosen: SweepSettings, one: AtWork) -> bool:
    """Report the calibrated validation loss at the end of each cycle to Optuna; returns whether it prunes the trial."""
    try:
        losses = course_of(one.trial.key).valid_losses
    except Unreachable:
        return False
    full = parse_text(with_overrides("params.yaml", as_overrides(one.optuna.params))).train_full
    ends = itertools.accumulate(full.cycle_len * full.cycle_mult**cycle for cycle in range(full.cycles))
    reached = [end for end in ends if end <= len(losses)]
    for number, end in enumerate(reached[one.cycles :], one.cycles + 1):
        one.optuna.report(losses[end - 1] if chosen.direction == "minimize" else -losses[end - 1], number)
    is_new, one.cycles = len(reached) > one.cycles, len(reached)
    return is_new and one.optuna.should_prune()


def _value(metric: str, key: str) -> float | None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            if (value := course_of(key).metrics.get(metric)) is not None:
                return value
        except Unreachable:
            pass
        time.sleep(1)
    return None


def _conclude(study: optuna.Study, chosen: SweepSettings, folder: Path) -> int:
    """Print the trials, the best first, and write the best one's settings to a file."""
    complete = study.get_trials(False, (TrialState.COMPLETE,))
    others = [
        trial
        for trial in study.get_trials(False, (TrialState.PRUNED, TrialState.FAIL))
        if "same" not in trial.user_attrs
    ]
    if not complete:
        raise UserError(f"No trial completed: see the logs in {folder}.")
    complete.sort(key=lambda trial: trial.value or 0.0, reverse=chosen.direction == "maximize")
    keys = list(complete[0].params)
    table = Table(
        "trial", *keys, chosen.metric.partition("/")[2], title=f"Search {study.study_name}", title_justify="left"
    )
    for trial in [*complete, *others]:
        result = f"{trial.value:.4f}" if trial.value is not None and trial in complete else trial.state.name.lower()
        table.add_row(str(trial.number + 1), *(_number(trial.params.get(key)) for key in keys), result)
    Console().print(table)
    best = folder / "best.yaml"
    nested: dict[str, Any] = {}
    for key, value in complete[0].params.items():
        section, _, last = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[last] = value
    best.write_text(yaml.safe_dump(nested), encoding="utf-8")
    print(f"The best: `unfreeze run --settings {best}` runs the whole recipe with it, and registers the model.")
    return 0


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _shown(params: Mapping[str, Any]) -> str:
    return mask(", ".join(f"{key}={_number(value)}" for key, value in params.items()))


def _digest(*paths: Path) -> str:
    """A short hash of files and of the commit: if one of them changes, the search is a new study."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, check=True).stdout
    return hashlib.sha256(b"".join([commit, *(path.read_bytes() for path in paths)])).hexdigest()[:8]
