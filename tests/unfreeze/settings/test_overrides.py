"""Values changed in `params.yaml`: comments and order stay, and invalid values change nothing."""

import os
from pathlib import Path

import pytest

from flows.cli import main
from tests.integration.project import paint
from unfreeze.errors import UserError
from unfreeze.settings.overrides import apply_overrides, read_overrides
from unfreeze.settings.schema import flatten, load_settings

TEXT = (Path(__file__).parent.parent.parent.parent / "params.yaml").read_text(encoding="utf-8")


@pytest.fixture
def params(tmp_path: Path) -> Path:
    file = tmp_path / "params.yaml"
    file.write_text(TEXT, encoding="utf-8")
    return file


def changes(params: Path) -> list[tuple[str, str]]:
    """Lines that differ, before and after. No line may be added or removed."""
    before, after = TEXT.splitlines(), params.read_text(encoding="utf-8").splitlines()
    return [(a, b) for a, b in zip(before, after, strict=True) if a != b]


def test_one_value_changes_one_line_and_keeps_its_comment(params: Path) -> None:
    apply_overrides(params, ["train_augmented.cycle_len=2"])
    old = "  cycle_len: 1            # epochs"
    assert changes(params) == [(old, old.replace("1", "2"))]
    assert load_settings(params).train_augmented.cycle_len == 2
    assert [file.name for file in params.parent.iterdir()] == ["params.yaml"]


def test_nothing_to_change_leaves_the_file_alone(params: Path) -> None:
    before = params.stat()
    apply_overrides(params, [])
    apply_overrides(params, ["lr_find.rate=null", "seed=42", "lr_find.start=1.0e-5"])
    assert params.read_text(encoding="utf-8") == TEXT
    assert (params.stat().st_ino, params.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("seed=7", 7),
        ("data.source=/photos/of my cats", "/photos/of my cats"),
        ("data.source=s3=a=b", "s3=a=b"),
        ("data.source='2024'", "2024"),
        ("data.source=no", "no"),
        ("data.source=>-\n  photos", "photos"),
        ("data.source=Café", "Café"),
        ("data.source=" + "long/" * 60, "long/" * 60),
        ("lr_find.rate=1e-5", 1e-5),
        ("lr_find.rate= 0.01 ", 0.01),
        ("lr_find.start=1E-6", 1e-6),
        ("data.grey_range=[-160, 240.5]", (-160, 240.5)),
        ("train_full.cycle_len=010", 10),
        ("train_full.until_overfitting=false", False),
        ("head.dropout=0", 0.0),
        ("backbone.name=torchvision:resnet34", "torchvision:resnet34"),
    ],
)
def test_values_are_yaml(params: Path, override: str, value: object) -> None:
    apply_overrides(params, [override])
    key = override.partition("=")[0]
    expected = flatten(load_settings_of(TEXT, params.parent)) | {key: value}
    assert flatten(load_settings(params)) == expected
    assert len(changes(params)) == 1


def load_settings_of(text: str, folder: Path) -> object:
    other = folder / "other.yaml"
    other.write_text(text, encoding="utf-8")
    return load_settings(other)


def test_a_rate_can_be_set_and_taken_back(params: Path) -> None:
    apply_overrides(params, ["lr_find.rate=0.01"])
    apply_overrides(params, ["lr_find.rate=null"])
    assert params.read_text(encoding="utf-8") == TEXT


def test_a_home_folder_is_written_out(params: Path) -> None:
    apply_overrides(params, ["data.source=~/photos"])
    assert load_settings(params).data.source == str(Path.home() / "photos")


def test_several_at_once_and_the_last_one_counts(params: Path) -> None:
    apply_overrides(params, ["data.valid=0.5", "data.test=0.3", "seed=1", "seed=2"])
    settings = load_settings(params)
    assert (settings.data.valid, settings.data.test, settings.seed) == (0.5, 0.3, 2)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["train_full.cycles"], "write it as key=value"),
        (["train_full.cycle=2"], "no key 'train_full.cycle'. Did you mean train_full.cycles?"),
        (["tta_views=2"], "Did you mean evaluate.tta_views?"),
        (["train_full=2"], "no key 'train_full'"),
        (["=2"], "no key ''"),
        (["seed=2", "train_full.cycles=0"], "train_full.cycles is 0"),
        (["train_full.cycles=3.0"], "train_full.cycles is 3.0"),
        (["unfreeze.freeze_to=false"], "unfreeze.freeze_to is false"),
        (["unfreeze.bn_freeze=yes"], "unfreeze.bn_freeze is 'yes'"),
        (["data.valid=0.9"], "leave nothing to train on"),
        (["seed="], "seed is ''"),
        (["lr_find.rate="], "lr_find.rate is ''"),
        (["data.source=a: b"], "data.source is "),
        (["data.image_size=[64, 128]"], "data.image_size is [64, 128]"),
        (["seed=[1"], "seed=[1: '[1', line 1 is not valid YAML"),
        (["seed=" + "[" * 1200], "is not valid YAML"),
        (["seed=!!python/object/apply:os.getpid []"], "is not valid YAML"),
        (["lr_find.rate=.inf"], "lr_find.rate is inf"),
    ],
)
def test_what_is_wrong_changes_nothing(params: Path, overrides: list[str], told: str) -> None:
    with pytest.raises(UserError) as caught:
        apply_overrides(params, overrides)
    assert told in str(caught.value)
    assert params.read_text(encoding="utf-8") == TEXT
    assert [file.name for file in params.parent.iterdir()] == ["params.yaml"]


def test_an_override_can_mend_what_is_wrong(params: Path) -> None:
    params.write_text(TEXT.replace("  cycles: 3  ", "  cycles: 0  "), encoding="utf-8")
    apply_overrides(params, ["train_full.cycles=3", "train_augmented.cycles=3"])
    assert load_settings(params).train_full.cycles == 3


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b"- 1\n", "must be a mapping"),
        (b"seed: [\n", "line 2 is not valid YAML"),
        (b"seed: 1\nseed: 2\n", "the key seed occurs twice"),
        (b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_broken_files_are_told_and_left_alone(params: Path, content: bytes, told: str) -> None:
    params.write_bytes(content)
    with pytest.raises(UserError, match=r"params\.yaml") as caught:
        apply_overrides(params, ["seed=2"])
    assert told in str(caught.value)
    assert params.read_bytes() == content


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        apply_overrides(tmp_path / "params.yaml", ["seed=2"])


def test_mode_and_link_stay(params: Path) -> None:
    params.chmod(0o664)
    link = params.parent / "link.yaml"
    link.symlink_to(params)
    apply_overrides(link, ["seed=2"])
    assert link.is_symlink() and load_settings(params).seed == 2
    assert params.stat().st_mode & 0o777 == 0o664


def test_a_failed_write_leaves_the_file_as_it_was(params: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        apply_overrides(params, ["seed=2"])
    assert params.read_text(encoding="utf-8") == TEXT
    assert [file.name for file in params.parent.iterdir()] == ["params.yaml"]


def test_a_file_of_settings_changes_what_it_names(params: Path, tmp_path: Path) -> None:
    file = tmp_path / "photographs.yaml"
    file.write_text(
        "data:\n  image_size: 224\n  grey_range: [0, 4095]\n  source: 'a: b'\naugment: {flip: none}\nlr_find:\n  rate: null\n"
    )
    overrides = read_overrides(file)
    assert overrides == [
        "data.image_size=224",
        "data.grey_range=[0, 4095]",
        'data.source="a: b"',
        "augment.flip=none",
        "lr_find.rate=null",
    ]
    apply_overrides(params, overrides)
    settings = load_settings(params)
    assert settings.data.source == "a: b"
    assert (settings.data.image_size, settings.augment.flip, settings.lr_find.rate) == (224, "none", None)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- 1\n", "must be a mapping"),
        ("a: [", "not valid YAML"),
        ("data:\n  image_sice: 2\n", "Did you mean data.image_size"),
    ],
)
def test_a_wrong_file_of_settings_changes_nothing(params: Path, tmp_path: Path, text: str, told: str) -> None:
    (file := tmp_path / "wrong.yaml").write_text(text)
    before = params.read_bytes()
    with pytest.raises(UserError, match=told):
        apply_overrides(params, read_overrides(file))
    assert params.read_bytes() == before


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parent.parent.parent.parent / "settings").glob("*.yaml")), ids=lambda file: file.stem
)
def test_the_settings_that_ship_are_right(params: Path, file: Path) -> None:
    apply_overrides(params, read_overrides(file))
    assert params.read_text(encoding="utf-8") != TEXT


def test_images_that_are_not_there_change_nothing(
    params: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise the next run would be refused too, even without ``-S``."""
    monkeypatch.chdir(params.parent)
    assert main(["run", "-S", "seed=7", "-S", "data.source=nowhere"]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    assert params.read_text(encoding="utf-8") == TEXT


def test_check_looks_at_changes_and_makes_none(
    params: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(params.parent)
    paint(params.parent / "photos", 0)
    network = ["-S", "backbone.name=timm:test_efficientnet", "-S", "backbone.weights=none", "-S", "data.image_size=32"]
    assert main(["check", "-S", "data.source=photos", *network]) == 0
    assert "with these changes is right; 48 images in photos" in capsys.readouterr().out
    assert main(["check", "-S", "data.source=fotos", *network]) == 2
    assert main(["check", "-S", "data.valid=2"]) == 2
    assert "data.valid is 2" in capsys.readouterr().err
    assert params.read_text(encoding="utf-8") == TEXT
