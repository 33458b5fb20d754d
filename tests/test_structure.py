"""Flow, dvc.yaml and tasks agree, and dvc.yaml watches the code that determines the outputs of a step."""

import ast
import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.artifacts import STAGES
from pipeline.step import Step
from pipeline.tracking.registry import REQUIREMENTS
from tests.test_walls import ROOT, imported, imported_names

DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
TELLING = (
    "pipeline/artifacts.py",
    "pipeline/dvc_cache.py",
    "pipeline/dvc_remote.py",
    "pipeline/exit_codes.py",
    "pipeline/mirror.py",
    "pipeline/process/",
    "pipeline/scratch.py",
    "pipeline/step.py",
    "pipeline/tracking/",
    "pipeline/watchable.py",
    "unfreeze/errors.py",
    "unfreeze/parallel.py",
    "unfreeze/progress.py",
    "unfreeze/settings/",
)
"""Code that only reports on a step, runs a step, or carries its settings, which DVC compares by value. A change in
this code does not change the outputs of a step."""
TEMPLATES = {
    f"unfreeze/reports/{name}.py": f"unfreeze/reports/templates/{page}.html"
    for name, page in (("html", "page"), ("explore", "explore"), ("evaluate", "evaluate"))
}
"""Template that a module reads, in addition to its imports."""
REGISTERED = ("pipeline/tracking/registry.py", "pipeline/tracking/served_model.py")
"""Modules that create the model that `register` passes to MLflow. The second module is passed by its path."""
MOST = 130
"""Maximum number of lines in dvc.yaml that name code. It names folders, so a new module in a folder needs no edit."""


def closure(*files: str) -> set[str]:
    """The files and all their direct and indirect imports, except those in ``TELLING``."""
    seen, waiting = set(files), list(files)
    while waiting:
        new = {file for file in imported(waiting.pop()) - seen if not file.startswith(TELLING)}
        seen |= new
        waiting += new
    seen |= {TEMPLATES[file] for file in seen if file in TEMPLATES}
    return {file for file in seen if not file.endswith("/__init__.py")}


def code(stage: str) -> list[str]:
    """Files and folders of code that dvc.yaml names for a stage."""
    return [dep for dep in DVC[stage]["deps"] if dep.startswith(("unfreeze/", "pipeline/", "tasks/"))]


def covers(dep: str, file: str) -> bool:
    return file == dep or file.startswith(f"{dep}/")


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_watches_the_code_that_a_stage_imports(stage: str) -> None:
    needed = closure(f"tasks/{stage}.py", *(REGISTERED if stage == "register" else ()))
    assert not {file for file in needed if not any(covers(dep, file) for dep in code(stage))}


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_watches_no_code_that_a_stage_does_not_import(stage: str) -> None:
    needed = closure(f"tasks/{stage}.py", *(REGISTERED if stage == "register" else ()))
    assert not [dep for dep in code(stage) if not any(covers(dep, file) for file in needed)]
    assert not [dep for dep in code(stage) if not (ROOT / dep).exists()]


@pytest.mark.parametrize("stage", STAGES)
def test_what_only_tells_people_about_a_step_makes_it_not_stale(stage: str) -> None:
    own = REGISTERED if stage == "register" else ()
    assert not [dep for dep in code(stage) if f"{dep}/".startswith(TELLING) and dep not in own]
    # If a folder contains other steps' reports, or code that only reports, dvc.yaml names single files of it.
    assert not {"unfreeze", "unfreeze/reports", "pipeline", "tasks"} & set(code(stage))


def test_dvc_does_not_see_what_python_compiles() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "check-ignore", "unfreeze/data/__pycache__/packed.cpython-311.pyc"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_dvc_names_folders_of_code() -> None:
    assert sum(len(code(stage)) for stage in STAGES) <= MOST


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
    files = {file.stem for file in (ROOT / "tasks").glob("*.py")}
    assert files == {*STAGES, "__init__", "__main__"}


def test_params_have_a_section_for_every_step_that_has_settings() -> None:
    sections = set(yaml.safe_load((ROOT / "params.yaml").read_text()))
    assert {section for stage in DVC.values() for section in stage["params"]} | {"checkpoint", "device"} == sections


def test_a_served_model_is_installed_with_all_that_it_imports() -> None:
    seen, waiting, names = {REGISTERED[1]}, [REGISTERED[1]], set()
    while waiting:
        file = waiting.pop()
        names |= {name.split(".")[0] for name in imported_names(ast.parse((ROOT / file).read_text()))}
        new = imported(file) - seen
        seen |= new
        waiting += new
    others = names - sys.stdlib_module_names - {"pipeline", "tasks", "unfreeze", "mlflow"}  # MLflow adds itself
    packages = importlib.metadata.packages_distributions()  # several packages may contain one module name
    missing = {name for name in others if not set(map(canonical, packages[name])) & set(REQUIREMENTS)}
    assert "unfreeze/batches/rendering.py" in seen and not missing
    # With the model, MLflow gets the folder unfreeze/ and nothing else of the project.
    assert {Path(file).parts[0] for file in seen} - {"unfreeze"} == {"pipeline"}
    assert [file for file in seen if file.startswith("pipeline/")] == [REGISTERED[1]]


def canonical(package: str) -> str:
    return package.lower().replace("_", "-")
