"""The settings: valid values get their types, and invalid values give a message that names the key."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from ruamel.yaml import YAML

from unfreeze.errors import UserError
from unfreeze.settings.overrides import apply_overrides, read_overrides
from unfreeze.settings.schema import Settings, flatten, load_settings, parse_settings, parse_text
from unfreeze.settings.yaml_loader import read_yaml

SHIPPED = Path(__file__).parent.parent.parent.parent / "params.yaml"
TEXT = SHIPPED.read_text(encoding="utf-8")
PARAMS: dict[str, Any] = YAML(typ="safe").load(TEXT)
KEYS = list(flatten(PARAMS))


def changed(key: str, value: object) -> dict[str, Any]:
    """The shipped settings with another value for a key."""
    params = copy.deepcopy(PARAMS)
    *sections, last = key.split(".")
    target = params
    for section in sections:
        target = target[section]
    target[last] = value
    return params


def complaint(params: object) -> str:
    """Error message for the user."""
    with pytest.raises(UserError) as caught:
        parse_settings(params)
    return str(caught.value)


def test_shipped_settings_are_right_and_all_of_them() -> None:
    assert flatten(load_settings(SHIPPED)) == flatten(PARAMS)
    assert list(flatten(load_settings(SHIPPED))) == KEYS


def test_settings_are_typed_and_frozen() -> None:
    settings = parse_settings(changed("augment.rotate", 10))
    assert isinstance(settings.augment.rotate, float)
    assert settings.lr_find.rate is None
    assert settings.train_full.epochs == 3 + 6 + 12
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 1  # type: ignore[misc]


def test_flatten_of_one_section() -> None:
    settings = load_settings(SHIPPED)
    assert flatten({"head": settings.head, "seed": 3}) == {"head.dropout": 0.5, "seed": 3}


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("seed", -1, "a whole number, at least 0 and at most 2147483647"),
        ("seed", True, "a whole number"),
        ("seed", None, "a whole number"),
        ("data.source", "", "text"),
        ("data.source", "  ", "text"),
        ("data.source", 2024, "text. Put it in quotes."),
        ("data.image_size", 31, "at least 32 and at most 1024"),
        ("data.image_size", 1025, "at least 32 and at most 1024"),
        ("data.image_size", 160.0, "a whole number"),
        ("data.image_size", "160", "a whole number"),
        ("data.valid", 0, "above 0 and below 1"),
        ("data.valid", 1, "above 0 and below 1"),
        ("data.test", -0.1, "at least 0 and below 1"),
        ("data.max_broken", 1.1, "at least 0 and at most 1"),
        ("data.max_megapixels", float("inf"), "a number"),
        ("data.max_megapixels", 10**400, "a number"),
        ("data.max_megapixels", 0, "above 0"),
        (
            "data.grey_range",
            "auto?",
            "auto, or [low, high], two numbers, the first below the second. Did you mean auto?",
        ),
        ("data.grey_range", [5, 5], "the first below the second"),
        ("data.grey_range", [0, 4095, 1], "[low, high], two numbers"),
        ("data.grey_range", [0, float("inf")], "two numbers"),
        ("data.grey_range", [0, True], "two numbers"),
        ("data.grey_range", 4095, "two numbers, the first below the second."),
        ("data.grey_range", None, "auto, or"),
        ("head.dropout", 1, "below 1"),
        ("head.dropout", "0.5", "a number"),
        ("head.dropout", "half", "a number"),
        ("augment.flip", "dihedrall", "one of none, horizontal, both, dihedral. Did you mean dihedral?"),
        ("augment.flip", False, "one of none, horizontal, both, dihedral"),
        ("augment.zoom", 0.9, "at least 1"),
        ("batch_size", 1, "at least 2"),
        ("batch_size", "autoo", "auto, or a whole number, at least 2 and at most 65536. Did you mean auto?"),
        ("train.optimizer", "adam", "one of adamw, sgd. Did you mean adamw?"),
        ("lr_find.start", float("nan"), "a number"),
        ("lr_find.start", "nan", "a number"),
        ("lr_find.start", "1_0", "a number"),
        ("lr_find.rate", "none", "or null"),
        ("lr_find.rate", 0, "above 0"),
        ("train_head.epochs", 0, "at least 1"),
        pytest.param("train_head.epochs", 1 << 20_000, "at most 10000", id="digits that Python refuses to write"),
        ("train_full.schedule", "sdgr", "Did you mean sgdr?"),
        ("train_full.cycles", [1], "a whole number"),
        ("train_full.until_overfitting", 1, "true or false"),
        ("unfreeze.freeze_to", 3, "at least 0 and at most 2"),
        ("unfreeze.lr_ratio", 0.5, "at least 1"),
        ("unfreeze.bn_freeze", "yes", "true or false"),
        ("evaluate.tta_views", 0, "at least 1 and at most 64"),
        ("evaluate.tta_views", 65, "at least 1 and at most 64"),
        ("register.model_name", "team/unfreeze", "without / and :"),
    ],
)
def test_wrong_value(key: str, value: object, allowed: str) -> None:
    told = complaint(changed(key, value))
    assert told.startswith(f"params.yaml: {key} is ")
    assert allowed in told
    assert "\n" not in told and len(told) < 300


@pytest.mark.parametrize("text", ["1e-5", "1E-05", "1.e-5", ".1e-4", "+1e-5"])
def test_numbers_that_yaml_1_1_takes_for_text(text: str) -> None:
    assert parse_settings(changed("lr_find.start", text)).lr_find.start == pytest.approx(1e-5)
    assert parse_text(TEXT.replace("start: 1.0e-5", f"start: {text}")).lr_find.start == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("params", "told"),
    [
        (changed("data.source", "~/photos"), f"DVC does not know ~; write {Path.home()}/photos."),
        (changed("data.valid", 0.8), "data.valid and data.test together leave nothing to train on"),
        (changed("lr_find.start", 10.0), "lr_find.start is 10, but must be below lr_find.end, 10."),
        (changed("unfreeze_lr_find.end", 1e-7), "unfreeze_lr_find.start is 0.0001, but must be below"),
        (
            changed("train_full.cycle_len", 4000),
            "train_full: cycles, cycle_len and cycle_mult make more than 10000 epochs",
        ),
    ],
)
def test_values_that_do_not_go_together(params: dict[str, Any], told: str) -> None:
    assert told in complaint(params)


@pytest.mark.parametrize("file", sorted(SHIPPED.parent.glob("settings/*.yaml")), ids=lambda file: file.stem)
def test_shipped_changes_of_settings_are_valid(file: Path, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(TEXT, encoding="utf-8")
    apply_overrides(tmp_path / "params.yaml", read_overrides(file))
    assert load_settings(tmp_path / "params.yaml") != parse_text(TEXT)


def test_unknown_keys_suggest_near_ones() -> None:
    params = changed("train_full.cycle", 3)
    assert "train_full.cycle is not a setting. Did you mean train_full.cycles?" in complaint(params)
    assert "train_fulll is not a setting. Did you mean train_full?" in complaint(changed("train_fulll", {}))
    assert "head.zzz is not a setting. There are: dropout." in complaint(changed("head.zzz", 1))
    assert "train.batch_size is not a setting. Did you mean batch_size?" in complaint(changed("train.batch_size", 8))
    assert "train.dropout is not a setting. Did you mean head.dropout?" in complaint(changed("train.dropout", 0.1))
    assert "7 is not a setting" in complaint(changed("head", {7: 1, "dropout": 0.5}))


def test_everything_wrong_is_told_at_once() -> None:
    params = changed("data.valid", 2)
    params["train"]["decay"] = params["train"].pop("weight_decay")
    params["head"] = None
    del params["evaluate"]
    told = complaint(params).splitlines()
    assert told[0] == "params.yaml: "
    assert [line.split()[1] for line in told[1:]] == [
        "data.valid",
        "head",
        "train.decay",
        "train.weight_decay",
        "evaluate",
    ]


@pytest.mark.parametrize("content", [None, [], "text", 3, [[[]]] * 1000])
def test_not_a_mapping(content: object) -> None:
    assert "the file must be a mapping of keys to values, not" in complaint(content)
    assert len(complaint(content)) < 300


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "empty"),
        ("# only a comment\n", "empty"),
        ("- 1\n", "must be a mapping"),
        ("seed: 1\nhead: [\n", "line 3 is not valid YAML"),
        ("seed:\n\t- 1", "line 2 is not valid YAML"),
        (
            "data:\n<<<<<<< HEAD\n  valid: 0.1\n=======\n  valid: 0.2\n>>>>>>> other\n",
            "line 2 is not valid YAML: an unresolved merge conflict",
        ),
        ("seed: 1\n---\nseed: 2\n", "line 2 is not valid YAML"),
        (
            TEXT + "\nhead:\n  dropout: 0.1\n",
            f"line {TEXT.count(chr(10)) + 2} is not valid YAML: the key head occurs twice, first in line",
        ),
        (TEXT.replace("  dropout: 0.5", "  dropout: 0.5\n  dropout: 0.4"), "the key dropout occurs twice"),
        ("seed: !!bool foo", "not valid YAML"),
        ("seed: !!int ''", "not valid YAML"),
        ("seed: !!float ''", "not valid YAML"),
        ("seed: !!timestamp foo", "not valid YAML"),
        ("seed: !!python/object/apply:os.getpid []", "line 1 is not valid YAML"),
        ("? [1, 2]\n: 3", r"(1, 2) is not a setting"),
        ("seed: \x00", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("seed: 0x" + "f" * 6000, "seed is a number of thousands of digits"),
        ("seed: " + "9" * 6000, "not valid YAML"),
    ],
)
def test_broken_yaml(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_settings(file)
    assert str(file) in str(caught.value) and told in str(caught.value)


def test_aliases_that_multiply_are_not_written_out() -> None:
    levels = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
    with pytest.raises(UserError) as caught:
        parse_text(f"a0: &a0 [x, x]\n{levels}seed: *a8\n")
    assert len(str(caught.value)) < 10_000


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.yaml cannot be read: No such file"):
        load_settings(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_settings(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"seed: \xff")
    with pytest.raises(UserError, match="not UTF-8"):
        load_settings(tmp_path / "latin.yaml")


NUMBERS = [
    "1",
    "-1",
    "+1",
    "010",
    "0o17",
    "0x1F",
    "1:30",
    "0.5",
    ".5",
    "1.",
    "1e-5",
    "1e5",
    "1.5E+3",
    ".inf",
    "-.inf",
    "1_000",
]
WORDS = ["yes", "no", "on", "off", "y", "true", "True", "TRUE", "tRue", "false", "null", "Null", "~", "none", "nan"]
TEXTS = ["'1e-5'", '"no"', "sample:elpv", "timm:x", "2026-01-02x", "2026-01-02"]


@pytest.mark.parametrize("scalar", NUMBERS + WORDS + TEXTS)
def test_scalars_mean_what_they_mean_to_dvc(scalar: str) -> None:
    theirs = YAML(typ="safe").load(f"key: {scalar}")["key"]
    ours = read_yaml(f"key: {scalar}", "params.yaml")["key"]
    assert (type(ours), ours) == (type(theirs), theirs)


HUGE = st.integers(20_000, 20_001).map(lambda digits: 1 << digits)
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["1e-5", "1e9"])
    | HUGE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=5,
)


@budget(max_examples=300, deadline=None, database=None)
@given(key=st.sampled_from(KEYS + list(PARAMS)), value=ANYTHING)
def test_any_value_is_taken_or_told(key: str, value: Any) -> None:
    try:
        settings = parse_settings(changed(key, value))
    except UserError as error:
        assert key in str(error)
    else:
        assert isinstance(settings, Settings)
        assert list(flatten(settings)) == KEYS


@budget(max_examples=50, deadline=None, database=None)
@given(key=st.sampled_from(KEYS), name=st.text(max_size=12) | st.integers() | st.none() | HUGE)
def test_any_renamed_key_is_told(key: str, name: Any) -> None:
    params = copy.deepcopy(PARAMS)
    *sections, last = key.split(".")
    target = params[sections[0]] if sections else params
    value = target.pop(last)
    told = complaint(params)
    assert f"{key} is missing" in told
    if name != last and name not in target:
        target[name] = value
        assert "is not a setting" in complaint(params)


@budget(max_examples=200, deadline=None, database=None)
@given(
    start=st.integers(0, len(TEXT)),
    length=st.integers(0, 60),
    put=st.text(max_size=12) | st.text("\n :-[]{}&*!#'\"|>%@`?,\t"),
)
def test_any_text_is_taken_or_told(start: int, length: int, put: str) -> None:
    for text in (put, TEXT[:start] + put + TEXT[start + length :]):
        try:
            assert isinstance(parse_text(text, "params.yaml"), Settings)
        except UserError as error:
            assert str(error).startswith("params.yaml")
