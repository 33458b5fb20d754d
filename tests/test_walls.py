"""Rules for the code base: allowed imports between packages, no cycles, no large files, portable file names."""

import ast
import graphlib
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("unfreeze", "pipeline", "tasks", "flows")
LEVELS = (
    ("unfreeze.errors", "unfreeze.device", "unfreeze.parallel", "unfreeze.progress"),
    ("unfreeze.settings", "unfreeze.persistence"),
    ("unfreeze.data", "unfreeze.models", "unfreeze.acceleration"),
    ("unfreeze.batches",),
    ("unfreeze.evaluation",),
    ("unfreeze.training", "unfreeze.reports"),
    ("pipeline",),
    ("tasks", "flows"),
)
"""Packages from the lowest level up. A package may import lower levels, and its own level if there is no cycle."""
BANNED = {
    "unfreeze": {"prefect", "dvc", "mlflow", "pickle", "rich"},
    "pipeline": {"prefect", "dvc", "pickle"},
    "tasks": {"prefect", "dvc", "mlflow", "pickle"},
    "flows": {"dvc", "mlflow", "pickle", "torch", "timm", "torchvision"},
}
"""Libraries that a package may not import. DVC is run as a command, and imported nowhere."""
APART = {
    "unfreeze/training/": ("unfreeze/reports/",),
    "unfreeze/reports/": ("unfreeze/training/",),
    "pipeline/process/": ("pipeline/step.py", "pipeline/tracking/"),
    "pipeline/tracking/": ("pipeline/step.py",),
}
"""Code that a package does not import although its level allows it; see the package's docstring."""
LONGEST = 400
"""Maximum number of lines of a file."""

FILES = [str(file.relative_to(ROOT)) for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]


def imported_names(tree: ast.AST) -> set[str]:
    """All dotted names that are imported anywhere in a file: modules, and names imported from them."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def imported(file: str) -> set[str]:
    """Files of the project that a file imports, anywhere in the file."""
    names = imported_names(ast.parse((ROOT / file).read_text()))
    paths = {name.replace(".", "/") for name in names if name.split(".")[0] in PACKAGES}
    files = {f"{path}.py" for path in paths} | {f"{path}/__init__.py" for path in paths}
    return {file for file in files if (ROOT / file).exists()}


def level(file: str) -> int:
    """Level of a file, counted from the lowest; -1 if it has no level."""
    name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    found = [i for i, row in enumerate(LEVELS) for package in row if f"{name}.".startswith(f"{package}.")]
    return found[0] if found else -1


def test_every_file_has_a_level() -> None:
    assert [file for file in FILES if level(file) < 0] == ["unfreeze/__init__.py"]


@pytest.mark.parametrize("folder", sorted({str(Path(file).parent) for file in FILES}))
def test_every_package_says_what_lives_there_and_what_may_import_it(folder: str) -> None:
    text = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()))
    assert text and (folder == "unfreeze" or "import" in text)


@pytest.mark.parametrize("file", FILES)
def test_no_import_goes_up(file: str) -> None:
    assert not {other for other in imported(file) if level(other) > level(file)}


def test_there_are_no_circles() -> None:
    graphlib.TopologicalSorter({file: imported(file) for file in FILES}).prepare()


def test_there_are_no_circles_of_packages() -> None:
    """Cycles within one level are forbidden too: for example, data and models may not import each other."""

    def package(file: str) -> str:
        return str(Path(file).parent) if file.count("/") > 1 else file.split("/")[0]

    graph: dict[str, set[str]] = {}
    for file in FILES:
        if file.startswith("unfreeze/") and file.count("/") > 1:
            others = {package(other) for other in imported(file) if other.count("/") > 1}
            graph.setdefault(package(file), set()).update(others - {package(file)})
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("file", FILES)
def test_libraries_are_imported_where_they_belong(file: str) -> None:
    names = {name.split(".")[0] for name in imported_names(ast.parse((ROOT / file).read_text()))}
    package = file.split("/")[0]
    assert not names & BANNED[package]
    if not file.startswith("pipeline/tracking/"):
        assert "mlflow" not in names
    if package == "flows":
        assert "tasks" not in names  # DVC starts the steps
    if package == "tasks":
        assert "flows" not in names


@pytest.mark.parametrize("file", FILES)
def test_no_file_imports_what_its_package_says_it_does_not(file: str) -> None:
    banned = tuple(other for package, others in APART.items() if file.startswith(package) for other in others)
    assert not banned or not {other for other in imported(file) if other.startswith(banned)}


def tracked() -> list[str]:
    """Names of all files under version control."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no Git here")
    return [name for name in done.stdout.split("\0") if name]


def test_no_file_is_long() -> None:
    files = [name for name in tracked() if name.endswith(".py") and (ROOT / name).exists()]
    lines = {name: (ROOT / name).read_text().count("\n") for name in files}
    assert not {name: count for name, count in lines.items() if count > LONGEST}


def refused_by_windows(name: str) -> bool:
    """Whether Windows refuses a file or folder with this name."""
    devices = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in "0123456789¹²³")}
    return (
        any(character in '<>:"|?*\\' or ord(character) < 32 for character in name)
        or name.endswith((".", " "))
        or name.split(".")[0].rstrip().lower() in devices
    )


def test_windows_can_check_out_every_file() -> None:
    names = tracked()
    assert not [name for name in names if any(map(refused_by_windows, name.split("/")))]
    folders = {str(folder) for name in names for folder in Path(name).parents}
    count = Counter(name.lower() for name in {*names, *folders})
    assert not [name for name in names if count[name.lower()] > 1]


@pytest.mark.parametrize(
    "name", ["sample:elpv", "what?", "a.", "b ", "nul", "Com1.txt", "aux .py", 'a"b', "a\\b", "a\tb"]
)
def test_names_that_windows_refuses(name: str) -> None:
    assert refused_by_windows(name)


@pytest.mark.parametrize("name", ["elpv.yaml", ".gitignore", "console.py", "com.py", "a b.txt", "nullable.py"])
def test_names_that_windows_takes(name: str) -> None:
    assert not refused_by_windows(name)
