"""Search over settings: invalid searches, no repeated trials, pruning of poor trials, and resuming after a kill.

Optuna's study and MLflow's results are real. Trials write their results to MLflow instead of training.
"""

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric

from flows import sweep as module
from flows.sweep import Range, _search, _study, read_sweep
from pipeline.tracking.sender import PASS_TAG, STAGE_TAG
from unfreeze.errors import UserError

ROOT = Path(__file__).parent.parent.parent
METRIC = "evaluate/valid_tta_log_loss"
RATIOS = [1, 2, 3, 4, 5, 6]


def content(**changes: Any) -> dict[str, Any]:
    return {
        "trials": 6,
        "metric": METRIC,
        "direction": "minimize",
        "sampler": "grid",
        "prune": False,
        "parallel": 1,
        "deployment": None,
        "settings": {"unfreeze.lr_ratio": RATIOS},
    } | changes


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database, created once because creating its tables takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").create_experiment("unfreeze", artifact_location=str(path.parent))
    return path


@pytest.fixture
def here(tmp_path: Path, empty: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".unfreeze/sweep").mkdir(parents=True)
    shutil.copy(empty, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "unfreeze")
    monkeypatch.setattr(module, "PAUSE", 0.0)
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    return tmp_path


def written(**changes: Any) -> Path:
    Path("sweep.yaml").write_text(yaml.safe_dump(content(**changes)))
    return Path("sweep.yaml")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metric": "evaluate/test_tta_accuracy"}, "test images must not be used to choose"),
        ({"metric": "retrain/test_accuracy"}, "test images must not be used to choose"),
        ({"settings": {}}, "a key `settings`"),
        ({"settings": {"unfreeze.lr_ration": [1]}}, "Did you mean unfreeze.lr_ratio"),
        ({"settings": {"unfreeze.lr_ratio": [3, -1]}}, "unfreeze.lr_ratio"),
        ({"settings": {"train.weight_decay": {"low": 0.1, "high": 2}}}, "train.weight_decay"),
        ({"settings": {"train.weight_decay": {"low": 0.1, "high": 0.2}}}, "is a range"),
        ({"settings": {"train.weight_decay": {"low": 0, "high": 0.2, "log": True}}}, "with log above 0"),
        ({"settings": {"train.weight_decay": {"low": 0.2, "high": 0.1}}}, "must be a list"),
        ({"settings": {"train.weight_decay": 0.1}}, "must be a list"),
        ({"sampler": "bayes"}, "sampler"),
        ({"trials": 0}, "trials"),
        ({"trails": 3}, "trails"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_runs(
    here: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        read_sweep(written(**changes))


def test_the_example_is_right() -> None:
    chosen, space = read_sweep(ROOT / "sweep.yaml")
    assert chosen.trials == 12 and space["train.weight_decay"] == Range(0.001, 0.3, True)


@dataclass
class Instant:
    """A trial that ends at once or, with ``has_ended=None``, runs until it is stopped."""

    key: str
    has_ended: bool | None = True
    stopped: bool = False

    def ended(self) -> bool | None:
        return self.has_ended

    def stop(self) -> None:
        self.stopped = True


@dataclass
class Results:
    """Starts trials that only write results to MLflow: the log loss is the distance of `lr_ratio` from 4."""

    started: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    dies_at: int | None = None
    slow: bool = False

    def start(self, number: int, slot: int, settings: Mapping[str, Any], known: str | None) -> Instant:
        if number == self.dies_at:
            raise KeyboardInterrupt
        ratio = settings["unfreeze.lr_ratio"]
        self.started.append(ratio)
        self.slots.append(slot)
        mlflow = MlflowClient()
        experiment = mlflow.get_experiment_by_name("unfreeze").experiment_id
        key = f"{number}"
        parent = mlflow.create_run(experiment, tags={PASS_TAG: key}).info.run_id
        step = mlflow.create_run(experiment, tags={"mlflow.parentRunId": parent, STAGE_TAG: "train_full"}).info.run_id
        losses = [Metric("valid_calibrated_loss", abs(ratio - 4) + 1 / (1 + epoch), 0, epoch) for epoch in range(8)]
        mlflow.log_batch(step, losses)
        mlflow.log_metric(parent, METRIC, abs(ratio - 4))
        return Instant(key, None if self.slow and ratio in (1, 6) else True)

    def close(self) -> None:
        pass


def search(results: Results, **changes: Any) -> Any:
    chosen, space = read_sweep(written(**changes))
    study = _study("test", chosen, space, seed=0)
    _search(study, chosen, space, results, [])  # type: ignore[arg-type]
    return study


def test_none_is_tried_twice_and_the_best_is_found(here: Path) -> None:
    results = Results()
    study = search(results)
    assert sorted(results.started) == RATIOS and set(results.slots) == {0}
    assert study.best_params == {"unfreeze.lr_ratio": 4} and study.best_value == 0


def test_a_sampler_that_repeats_itself_ends_when_all_is_tried(here: Path) -> None:
    results = Results()
    search(results, sampler="tpe", trials=50)
    assert sorted(results.started) == RATIOS


def test_killed_it_goes_on_with_the_trial_that_was_at_work(here: Path) -> None:
    first = Results(dies_at=3)
    with pytest.raises(KeyboardInterrupt):
        search(first)
    second = Results()
    study = search(second)
    assert len(first.started) == 3 and sorted(first.started + second.started) == RATIOS
    assert study.best_params == {"unfreeze.lr_ratio": 4}


def test_trials_at_once_have_worktrees_of_their_own(here: Path) -> None:
    results = Results()
    search(results, parallel=2)
    assert set(results.slots) == {0, 1} and sorted(results.started) == RATIOS


def test_a_poor_trial_is_stopped_after_a_cycle(here: Path) -> None:
    """The two worst trials have not ended when their cycles are checked; four other trials have ended."""
    from optuna.trial import TrialState

    ratios = [2, 3, 4, 5, 1, 6]
    chosen, space = read_sweep(written(prune=True, sampler="random"))
    study = _study("test", chosen, space, seed=0)
    for ratio in ratios:
        study.enqueue_trial({"unfreeze.lr_ratio": ratio})
    for trial in range(4):  # Optuna knows the cycles of these trials
        asked = study.ask()
        for cycle in (1, 2):
            asked.report(abs(ratios[trial] - 4) + 1 / (4 * cycle), cycle)
        asked.suggest_categorical("unfreeze.lr_ratio", RATIOS)
        study.tell(asked, abs(ratios[trial] - 4))
    _search(study, chosen, space, Results(slow=True), [])  # type: ignore[arg-type]
    pruned = study.get_trials(False, (TrialState.PRUNED,))
    assert sorted(trial.params["unfreeze.lr_ratio"] for trial in pruned) == [1, 6]
    assert pruned[0].intermediate_values[1] == pytest.approx(3 + 1 / 4, abs=1)


def test_another_commit_is_another_search(here: Path) -> None:
    path = written()

    def name() -> str:
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "--allow-empty", "-m", "x"], check=True)  # fmt: skip
        return module._digest(path, Path("params.yaml"))

    subprocess.run(["git", "init", "-q"], check=True)
    assert name() != name()
