"""The house stands: walls between the packages, and flow, dvc.yaml and tasks say the same."""

import ast
import importlib
import importlib.metadata
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.artifacts import STAGES
from pipeline.step import Step
from pipeline.tracking.registry import REQUIREMENTS

ROOT = Path(__file__).parent.parent
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# Modules that tell people about a step, or carry its settings, which DVC compares by value: a change in them changes
# nothing that a step writes.
TELLING = {
    "pipeline/__init__.py",
    "pipeline/exit_codes.py",
    "tasks/__init__.py",
    "pipeline/process/environment.py",
    "pipeline/artifacts.py",
    "pipeline/tracking/journal.py",
    "pipeline/process/secrets.py",
    "pipeline/dvc_cache.py",
    "pipeline/tracking/sender.py",
    "pipeline/scratch.py",
    "pipeline/step.py",
    "pipeline/process/signals.py",
    "pipeline/tracking/tracker.py",
    "pipeline/process/forkserver.py",
    "pipeline/process/lock.py",
    "unfreeze/__init__.py",
    "unfreeze/settings/validation.py",
    "unfreeze/persistence/atomic.py",
    "unfreeze/errors.py",
    "unfreeze/persistence/interruption.py",
    "unfreeze/progress.py",
    "unfreeze/settings/schema.py",
    "unfreeze/settings/yaml12.py",
}


def imported(file: str) -> set[str]:
    """The project's own files that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    files = {
        name.replace(".", "/") + ".py"
        for name in names
        if name.split(".")[0] in ("pipeline", "tasks", "unfreeze", "flows")
    }
    return {file for file in files if (ROOT / file).exists()}


def closure(*files: str) -> set[str]:
    """The files, all that they import, and that those import, but for those that only tell."""
    seen, waiting = set(files), list(files)
    while waiting:
        new = imported(waiting.pop()) - seen - TELLING
        seen |= new
        waiting += new
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_lists_the_code_that_a_stage_imports(stage: str) -> None:
    listed = {dep for dep in DVC[stage]["deps"] if dep.endswith(".py")}
    served = ["pipeline/tracking/served_model.py"] if stage == "register" else []  # handed to MLflow by its path
    assert listed == closure(f"tasks/{stage}.py", *served)


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_lists_the_settings_that_a_stage_reads(stage: str) -> None:
    step = getattr(importlib.import_module(f"tasks.{stage}"), stage)
    assert isinstance(step, Step)
    assert set(DVC[stage]["params"]) == set(step.sections)


def test_another_optimizer_leaves_packed_images_and_activations_as_they_are() -> None:
    assert [stage for stage in STAGES if "train" in DVC[stage]["params"]][0] == "lr_find"


@pytest.mark.parametrize("stage", STAGES)
def test_stages_run_their_own_file_and_read_what_earlier_ones_write(stage: str) -> None:
    assert DVC[stage]["cmd"] == f"python -m tasks {stage}"
    earlier: set[str] = set()
    for name in STAGES[: STAGES.index(stage)]:
        outputs = [o for kind in ("outs", "metrics", "plots") for o in DVC[name].get(kind, [])]
        earlier |= {o if isinstance(o, str) else next(iter(o)) for o in outputs}
    assert {dep for dep in DVC[stage]["deps"] if dep.startswith("artifacts/")} <= earlier


def test_flow_and_dvc_and_tasks_have_the_same_steps() -> None:
    from flows.recipe import STEPS

    assert [step.name for step in STEPS] == list(STAGES) == list(DVC)


def imports_of(package: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for file in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                found.setdefault(str(file.relative_to(ROOT)), set()).add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                found.setdefault(str(file.relative_to(ROOT)), set()).update(
                    alias.name.split(".")[0] for alias in node.names
                )
    return found


@pytest.mark.parametrize(
    ("package", "banned"),
    [
        ("unfreeze", {"prefect", "dvc", "mlflow", "pipeline", "tasks", "flows", "pickle", "rich"}),
        ("pipeline", {"prefect", "dvc", "tasks", "flows", "pickle"}),
        ("tasks", {"prefect", "dvc", "mlflow", "flows", "pickle"}),
        ("flows", {"torch", "timm", "torchvision", "mlflow", "dvc", "tasks", "pickle"}),
    ],
)
def test_walls(package: str, banned: set[str]) -> None:
    for file, names in imports_of(package).items():
        assert not names & banned, file


def test_params_have_a_section_for_every_step_that_has_settings() -> None:
    sections = set(yaml.safe_load((ROOT / "params.yaml").read_text()))
    assert {section for stage in DVC.values() for section in stage["params"]} | {"checkpoint"} == sections


def test_a_served_model_is_installed_with_all_that_it_imports() -> None:
    seen, waiting, names = {"pipeline/tracking/served_model.py"}, ["pipeline/tracking/served_model.py"], set()
    while waiting:
        file = waiting.pop()
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
        new = imported(file) - seen
        seen |= new
        waiting += new
    others = names - sys.stdlib_module_names - {"pipeline", "tasks", "unfreeze", "mlflow"}  # MLflow adds itself
    packages = {canonical(importlib.metadata.packages_distributions()[name][0]) for name in others}
    assert "unfreeze/batches/rendering.py" in seen and packages <= set(REQUIREMENTS)


def canonical(package: str) -> str:
    return package.lower().replace("_", "-")
