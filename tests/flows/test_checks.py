"""What cannot come to an end is refused before anything is written or run, through the command line and a flow's parameters."""

import shutil
from pathlib import Path

import pytest

from flows import passes
from flows.checks import check_all, check_for, check_images
from flows.cli import main
from flows.recipe import recipe
from tests.devices import NEEDS_NO_GPU
from tests.integration.project import paint
from unfreeze.errors import UserError
from unfreeze.settings.overrides import apply_overrides
from unfreeze.settings.schema import load_settings

PARAMS = Path(__file__).parent.parent.parent / "params.yaml"
WRONG = [
    ("data.source", "/nowhere", "/nowhere does not exist"),
    ("data.source", "few", "the class 'bright' has 2 images to be split"),
    ("backbone.name", "timm:efficientnet_lite", "backbone.name"),
    ("backbone.weights", "weights.safetensors", "weights.safetensors"),
    pytest.param("device", "cuda", "device is cuda, but CUDA does not work here", marks=NEEDS_NO_GPU),
]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params.yaml, whose data.source are 48 images; beside them, in `few`, are 4."""
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
    with pytest.raises(UserError, match=expected):
        recipe.fn({key: value})
    assert Path("params.yaml").read_bytes() == before


def test_a_pass_refuses_images_that_are_gone_before_it_asks_dvc(workspace: Path) -> None:
    shutil.rmtree("photos")
    with pytest.raises(UserError, match=r"data.source: photos does not exist"):
        passes.begin()


def test_check_says_which_class_has_too_few_images(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "-S", "data.source=few"]) == 2
    assert "the class 'bright' has 2 images to be split" in capsys.readouterr().err


def test_only_changes_that_touch_the_network_wait_for_torch() -> None:
    assert check_for(["seed=1", "data.image_size=64"]) is check_for([" backbone.name=x"]) is check_all
    assert check_for(["train_full.cycles=2", "head.dropout=0", "data.source=backbone.csv"]) is check_images


def test_what_changes_nothing_is_not_checked_again(workspace: Path) -> None:
    def never(settings: object) -> None:
        pytest.fail("checked")

    apply_overrides("params.yaml", ["data.source=photos"], never)
    assert load_settings().data.source == "photos"
