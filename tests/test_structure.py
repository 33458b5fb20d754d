"""The house stands: walls between the packages, and flow, dvc.yaml and tasks say the same."""

import ast
import importlib
import importlib.metadata
import sys
from pathlib import Path

import pytest
import yaml

from tasks import STAGES
from tasks.register import REQUIREMENTS
from tasks.step import Step

ROOT = Path(__file__).parent.parent
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# Modules that tell people about a step, or carry its settings, which DVC compares by value: a change in them changes
# nothing that a step writes.
TELLING = {
    "tasks/__init__.py",
    "tasks/environment.py",
    "tasks/files.py",
    "tasks/journal.py",
    "tasks/masking.py",
    "tasks/powercut.py",
    "tasks/publishing.py",
    "tasks/resuming.py",
    "tasks/step.py",
    "tasks/stopping.py",
    "tasks/tracking.py",
    "tasks/warm.py",
    "tasks/workspace.py",
    "unfreeze/__init__.py",
    "unfreeze/checking.py",
    "unfreeze/durable.py",
    "unfreeze/errors.py",
    "unfreeze/interruption.py",
    "unfreeze/progress.py",
    "unfreeze/settings.py",
    "unfreeze/yaml12.py",
}


def imported(file: str) -> set[str]:
    """The project's own files that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    files = {name.replace(".", "/") + ".py" for name in names if name.split(".")[0] in ("tasks", "unfreeze", "flows")}
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
    served = ["tasks/serving.py"] if stage == "register" else []  # handed to MLflow by its path
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
    for file in (ROOT / package).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                found.setdefault(file.name, set()).add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                found.setdefault(file.name, set()).update(alias.name.split(".")[0] for alias in node.names)
    return found


@pytest.mark.parametrize(
    ("package", "banned"),
    [
        ("unfreeze", {"prefect", "dvc", "mlflow", "tasks", "flows", "pickle", "rich", "ruamel"}),
        ("tasks", {"prefect", "dvc", "flows", "pickle"}),
        ("flows", {"torch", "timm", "torchvision", "pickle"}),
    ],
)
def test_walls(package: str, banned: set[str]) -> None:
    for file, names in imports_of(package).items():
        assert not names & banned, f"{package}/{file}"


def test_params_have_a_section_for_every_step_that_has_settings() -> None:
    sections = set(yaml.safe_load((ROOT / "params.yaml").read_text()))
    assert {section for stage in DVC.values() for section in stage["params"]} | {"checkpoint"} == sections


def test_a_served_model_is_installed_with_all_that_it_imports() -> None:
    seen, waiting, names = {"tasks/serving.py"}, ["tasks/serving.py"], set()
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
    others = names - sys.stdlib_module_names - {"tasks", "unfreeze", "mlflow"}  # MLflow adds itself
    packages = {canonical(importlib.metadata.packages_distributions()[name][0]) for name in others}
    assert "unfreeze/rendering.py" in seen and packages <= set(REQUIREMENTS)


def canonical(package: str) -> str:
    return package.lower().replace("_", "-")
