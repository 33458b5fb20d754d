"""Runs that cannot succeed are refused before anything is written or run.

This holds for the command line and for a flow's parameters.
"""

import errno
import io
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect.logging import disable_run_logger

from flows import dvc, passes
from flows.checks import LOOKED_AT, check_all, check_for, check_images, look_at_some
from flows.cli import UNREAD, main
from flows.recipe import recipe
from tests.devices import NEEDS_NO_GPU
from tests.integration.project import paint
from unfreeze.errors import UserError
from unfreeze.settings.overrides import apply_overrides
from unfreeze.settings.schema import load_settings

PARAMS = Path(__file__).parent.parent.parent / "params.yaml"
WRONG = [
    ("data.source", "/nowhere", "/nowhere does not exist"),
    ("data.source", "few", "2 classes have too few images (2 images each: 'bright', 'dark') to be split"),
    ("backbone.name", "timm:efficientnet_lite", "backbone.name"),
    ("backbone.weights", "weights.safetensors", "weights.safetensors"),
    pytest.param("device", "cuda", "device is cuda, but CUDA does not work here", marks=NEEDS_NO_GPU),
]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params.yaml, the folder `photos` (its data.source, 48 images) and the folder `few` (4 images)."""
    paint(tmp_path / "photos", 0)
    paint(tmp_path / "few", 0, 2)
    shutil.copy(PARAMS, tmp_path)
    monkeypatch.chdir(tmp_path)
    apply_overrides("params.yaml", ["data.source=photos"])
    return tmp_path


@pytest.mark.parametrize(("key", "value", "expected"), WRONG)
def test_the_command_line_refuses_before_it_writes(
    workspace: Path, key: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Path("params.yaml").read_bytes()
    assert main(["run", "-S", f"{key}={value}"]) == 2
    assert expected in capsys.readouterr().err
    assert Path("params.yaml").read_bytes() == before and not Path("artifacts").exists()


@pytest.mark.parametrize(("key", "value", "expected"), WRONG)
def test_a_flow_refuses_before_it_writes(workspace: Path, key: str, value: str, expected: str) -> None:
    before = Path("params.yaml").read_bytes()
    with pytest.raises(UserError, match=re.escape(expected)):
        recipe.fn({key: value})
    assert Path("params.yaml").read_bytes() == before


def test_a_pass_refuses_images_that_are_gone_before_it_asks_dvc(workspace: Path) -> None:
    shutil.rmtree("photos")
    with pytest.raises(UserError, match=r"data.source: photos does not exist"):
        passes.begin()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 48213\n"


@pytest.mark.parametrize("command", ["check", "run"])
def test_images_that_git_lfs_has_not_fetched_are_refused(
    workspace: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in Path("few").rglob("*.png"):
        for copy in range(4):
            file.with_name(f"{file.stem} {copy}.png").write_bytes(POINTER)
    before = Path("params.yaml").read_bytes()
    assert main([command, "-S", "data.source=few"]) == 2
    told = capsys.readouterr().err
    assert "16 of 20 examined images of few cannot be read" in told
    assert "bright/00 0.png: not an image that can be read: a Git LFS pointer" in told and "`git lfs pull`" in told
    assert Path("params.yaml").read_bytes() == before


def test_check_lists_the_few_that_cannot_be_read(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos/dark/a.png").write_bytes(POINTER)
    assert main(["check"]) == 0
    told = capsys.readouterr().out
    assert "Of 49 images that were looked at, 1 cannot be read" in told and "dark/a.png: not an image" in told


def test_of_many_images_some_are_looked_at(workspace: Path) -> None:
    for file in Path("photos").rglob("*.png"):
        for copy in range(4):
            shutil.copy(file, file.with_name(f"{file.stem} {copy}.png"))
    broken = [f"photos/dark/{i:02} {copy}.png" for copy in (1, 2) for i in range(9)]
    for file in broken:
        Path(file).write_bytes(POINTER)
    settings = load_settings()
    # 18 of 240 images are broken, about 8 of the 100 examined. The limit is 5, plus an allowance for chance.
    table = check_images(settings)
    looked_at, unreadable = look_at_some(table, settings.data)
    assert len(table) == 240 and looked_at == LOOKED_AT and 0 < len(unreadable) < len(broken)
    for file in Path("photos/bright").glob("* *.png"):
        file.write_bytes(POINTER)
    with pytest.raises(UserError, match="4. of 100 examined images of photos cannot be read"):
        check_images(settings)


def test_check_says_which_classes_have_too_few_images(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "-S", "data.source=few"]) == 2
    assert "2 classes have too few images (2 images each: 'bright', 'dark') to be split" in capsys.readouterr().err


def test_check_says_how_the_folder_was_understood(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("photos/dark", "photos/Dark")
    shutil.copytree("photos/dark", "photos/masks")
    options = ["-S", "data.exclude=masks", "-S", "data.min_images=9"]
    assert main(["check", *options]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        *(f"       24  {label}" for label in ("Dark", "bright", "dark")),
        "- These 2 classes may be the same, as their names differ only in capitals: 'Dark', 'dark'.",
    ]


@pytest.mark.parametrize("unbuffered", [False, True])  # True: as with PYTHONUNBUFFERED
def test_a_reader_that_has_read_enough_is_no_error(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, unbuffered: bool
) -> None:
    """For example `unfreeze check | head -1`, which closes the pipe early."""
    read, write = os.pipe()
    os.close(read)
    with io.TextIOWrapper(os.fdopen(write, "wb", 0 if unbuffered else -1), write_through=unbuffered) as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["check", "-S", "backbone.name=timm:test_efficientnet", "-S", "backbone.weights=none"]) == UNREAD


def test_only_changes_that_touch_the_network_wait_for_torch() -> None:
    assert check_for(["seed=1", "data.image_size=64"]) is check_for([" backbone.name=x"]) is check_all
    assert check_for(["train_full.cycles=2", "head.dropout=0", "data.source=backbone.csv"]) is check_images


def test_what_changes_nothing_is_not_checked_again(workspace: Path) -> None:
    def never(settings: object) -> None:
        pytest.fail("checked")

    apply_overrides("params.yaml", ["data.source=photos"], never)
    assert load_settings().data.source == "photos"


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_copy_of_the_project_does_not_run_the_originals_code(
    workspace: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A virtual environment that was set up in the original project would run the original's code."""
    Path("flows").mkdir()
    Path("flows/cli.py").touch()
    assert main([command, "-S", "data.source=photos"]) == 2
    assert f"`unfreeze` runs the code in {PARAMS.parent}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "check"])
def test_where_mlflow_cannot_be_is_said_before_anything_is_written(
    workspace: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "localhost:5000")
    before = Path("params.yaml").read_bytes()
    assert main([command, "-S", "data.valid=0.3"]) == 2
    assert "Write http://localhost:5000 for a server" in capsys.readouterr().err
    assert Path("params.yaml").read_bytes() == before and not Path("artifacts").exists()


@pytest.mark.parametrize("settings", [{"data.valid": 0.3}, ["data.valid=0.3"]])
def test_settings_of_a_run_that_cannot_begin_are_put_back(workspace: Path, settings: Any) -> None:
    """This run cannot begin: without Git, DVC cannot tell which steps are stale."""
    before = Path("params.yaml").read_bytes()
    with disable_run_logger(), pytest.raises(UserError, match="DVC cannot tell|not a Git repository"):
        recipe.fn(settings)
    assert Path("params.yaml").read_bytes() == before


def test_a_terminal_may_have_no_name(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container, a terminal of the host has no name."""
    ours, theirs = os.openpty()

    def none(number: int) -> str:
        raise OSError(errno.ENODEV, "no name")

    monkeypatch.setattr(os, "ttyname", none)
    monkeypatch.setattr(dvc, "stale_stages", set)
    monkeypatch.delenv("UNFREEZE_TTY", raising=False)
    with os.fdopen(theirs, "w") as terminal, disable_run_logger():
        monkeypatch.setattr(sys, "stderr", terminal)
        passes.begin()
    os.close(ours)
    assert "UNFREEZE_TTY" not in os.environ
