"""Invalid settings of every kind: the message names the key, or the line. There is no traceback and no hang."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flows.cli import main
from unfreeze.errors import UserError
from unfreeze.settings.overrides import apply_overrides, as_overrides, read_overrides
from unfreeze.settings.schema import Settings, flatten, load_settings, parse_text
from unfreeze.settings.yaml_loader import LEVELS, VALUES, read_yaml

pytestmark = pytest.mark.timeout(60)
TEXT = (Path(__file__).parent.parent.parent.parent / "params.yaml").read_text(encoding="utf-8")
KEYS = list(flatten(read_yaml(TEXT, "params.yaml")))
SOME = ["seed", "data.source", "head.dropout", "augment.flip", "lr_find.rate", "unfreeze.bn_freeze"]
"""One key of each type."""
BUDGET = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))

# fmt: off
WRONG = [
    ".nan", "-.inf", ".inf", "1e999", "-1e999", "-5", "9" * 5000, "-" + "9" * 5000, "0x" + "f" * 6000, "[]", "{}", "[1, [2, {a: 3}]]",
    "{a: {b: c}}", "- 1", "? x", "a: b", "|", ">-", "''", "'  '", '"\\0"', '"a\\nb"', '"a\\x85b"', '"a\\u2028b"', '"\\ud800"', '"\\ud83d\\ude00"',
    '"\\UFFFFFFFF"', '"\\q"', "'", '"', "[", "{", "]", "\t x", "`", "@", "%", "*nowhere", "&a [*a]", "&a {b: *a}", "!!binary aGk=",
    "!!set {a, b}", "!!omap [a: 1]", "!!timestamp 2026-01-01", "!!int ''", "!!int 1.5", "!!float x", "!!bool x", "!!str [a]", "!!map x", "!!seq x",
    "!!python/object/apply:os.system [exit]", "!!python/name:os.system", "!!python/object/new:os.system [exit]", "!foo bar", "!<tag:x> y",
    "[" * 3000, "{a: " * 3000, "[" * (LEVELS + 2) + "]" * (LEVELS + 2), "[" + "1," * VALUES + "]",
]
# fmt: on


def written(key: str, value: str) -> str:
    """The shipped settings with another text as the value of a key."""
    *sections, last = key.split(".")
    lines = TEXT.splitlines(keepends=True)
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{sections[0]}:")) if sections else 0
    place = next(i for i, line in enumerate(lines) if i >= start and line.strip().startswith(f"{last}:"))
    indent = lines[place][: len(lines[place]) - len(lines[place].lstrip())]
    return "".join([*lines[:place], f"{indent}{last}: {value}\n", *lines[place + 1 :]])


def told(error: UserError, key: str, text: str) -> None:
    """Check that a message is short, names the key or the line, and has no traceback or invalid character."""
    message = str(error)
    section, _, last = key.rpartition(".")
    assert (section in message and last in message) or ", line " in message, message
    assert len(message) < 400 and "Traceback" not in message and "\x00" not in message
    message.encode()


@pytest.fixture
def params(tmp_path: Path) -> Path:
    file = tmp_path / "params.yaml"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.mark.parametrize("value", WRONG, ids=lambda value: value[:30])
def test_in_params_yaml(value: str) -> None:
    for key in SOME if len(value) < 1000 else SOME[:1]:
        with pytest.raises(UserError) as caught:
            parse_text(written(key, value))
        assert str(caught.value).startswith("params.yaml")
        told(caught.value, key, value)


@pytest.mark.parametrize("value", WRONG, ids=lambda value: value[:30])
def test_on_the_command_line_and_in_a_file_of_settings(params: Path, value: str) -> None:
    for key in ("data.source", "lr_find.rate") if len(value) < 1000 else ("lr_find.rate",):
        with pytest.raises(UserError) as caught:
            apply_overrides(params, [f"{key}={value}"])
        told(caught.value, key, value)
        section, last = key.split(".")
        (file := params.parent / "settings.yaml").write_text(f"{section}:\n  {last}: {value}\n")
        if value not in ("{}",):  # a mapping without a key to change
            with pytest.raises(UserError) as caught:
                apply_overrides(params, read_overrides(file))
            told(caught.value, key, value)
    assert params.read_text(encoding="utf-8") == TEXT


MULTIPLIED = {
    "lists": "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)),
    "mappings": "a0: &a0 {x: 1}\n"
    + "".join(f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}\n" for i in range(1, 30)),
    "merges": "a0: &a0 {x: 1}\n"
    + "".join(f"a{i}: &a{i} {{!!merge <<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30)),
    "one in another": "seed: &a {b: [*a]}\n",
}


@pytest.mark.parametrize("kind", MULTIPLIED)
def test_aliases_of_aliases_are_not_written_out(params: Path, kind: str) -> None:
    (file := params.parent / "settings.yaml").write_text(MULTIPLIED[kind])
    for attempt in (
        lambda: load_settings(file),
        lambda: read_overrides(file),
        lambda: apply_overrides(file, ["seed=1"]),
        lambda: apply_overrides(params, [f"seed={{{MULTIPLIED[kind].replace(chr(10), ', ')}}}"]),
    ):
        with pytest.raises(UserError, match=f"line [0-9]+ is not valid YAML: (more than {VALUES} values|an alias)"):
            attempt()


def test_anchors_of_use_are_understood(params: Path) -> None:
    params.write_text(TEXT.replace("dropout: 0.5", "dropout: &none 0").replace("rotate: 0 ", "rotate: *none "))
    assert load_settings(params).augment.rotate == 0
    apply_overrides(params, ["seed=7"])
    assert (load_settings(params).augment.rotate, load_settings(params).seed) == (0, 7)
    params.write_text(TEXT.replace("seed: 42", "<<: {seed: 43}"))
    assert load_settings(params).seed == 43
    apply_overrides(params, ["seed=7"])
    assert load_settings(params).seed == 7


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (TEXT.replace("seed: 42", "seed: 42\nseed: 43").encode(), ["line 5", "seed occurs twice, first in line 4"]),
        (TEXT.replace("\n  valid", "\n\tvalid").encode(), ["line 11", "valid YAML"]),
        (TEXT.replace("seed: 42", "seed: 4\x002").encode(), ["line 4", "U+0000"]),
        (TEXT.replace("seed: 42", "seed: 42 # \x1b[2J").encode(), ["line 4", "U+001B"]),
        (TEXT.encode("utf-16"), ["not UTF-8 text"]),
        (TEXT.encode("utf-16-le"), ["line 1", "U+0000"]),
        (TEXT.replace("seed: 42", "seed: 42 # é").encode("latin-1"), ["not UTF-8 text"]),
        (bytes(range(256)) * 40, ["not UTF-8 text"]),
        (b"\xef\xbb\xbf", ["empty"]),
        (b"seed: 1\r\nhead: [\r\n", ["line 3"]),
        (b"---\nseed: 1\n---\nseed: 2\n", ["line 3", "valid YAML"]),
        (b"%YAML 9.9\n---\nseed: 1\n", ["line 1", "valid YAML"]),
    ],
)  # fmt: skip
def test_broken_files(params: Path, content: bytes, words: list[str]) -> None:
    params.write_bytes(content)
    for attempt in (lambda: load_settings(params), lambda: apply_overrides(params, ["seed=1"])):
        with pytest.raises(UserError) as caught:
            attempt()
        assert str(params) in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)
    assert params.read_bytes() == content


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf" + TEXT.encode(), TEXT.replace("\n", "\r\n").encode()])
def test_byte_order_marks_and_other_line_ends_do_no_harm(params: Path, content: bytes) -> None:
    params.write_bytes(content)
    assert load_settings(params) == parse_text(TEXT)
    apply_overrides(params, ["seed=7"])
    assert load_settings(params).seed == 7


SCALARS = st.one_of(
    st.sampled_from(WRONG),
    st.text(max_size=20),
    st.text("[]{}&*!|>'\"%@`#:-? \t\n0123456789.eE+xabcun~<=,\\", max_size=16),
    st.integers().map(str),
    st.floats().map(repr),
)


@settings(BUDGET, max_examples=100)
@given(key=st.sampled_from(KEYS), value=SCALARS)
def test_any_value_of_any_key_is_taken_as_it_is_or_told(key: str, value: str) -> None:
    text = written(key, value)
    try:
        taken = parse_text(text)
    except UserError as error:
        told(error, key, value)
    else:
        assert list(flatten(taken)) == KEYS


@settings(BUDGET, max_examples=150)
@given(override=st.one_of(st.tuples(st.sampled_from(KEYS), SCALARS).map("=".join), st.text(max_size=30)))
def test_any_override_is_taken_as_it_is_or_told(tmp_path_factory: pytest.TempPathFactory, override: str) -> None:
    params = tmp_path_factory.getbasetemp() / "params.yaml"
    params.write_text(TEXT, encoding="utf-8")
    key, _, value = override.partition("=")
    try:
        apply_overrides(params, [override])
    except UserError as error:
        assert len(str(error)) < 500
        assert params.read_text(encoding="utf-8") == TEXT
    else:
        found = flatten(load_settings(params))
        meant = read_yaml(value, "")
        if key.strip() == "data.source":
            meant = os.path.expanduser(meant)
        assert found == flatten(parse_text(TEXT)) | {key.strip(): meant}


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.binary(max_size=4) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@settings(BUDGET, max_examples=150)
@given(key=st.sampled_from([*KEYS, "data", "no.such", ""]), value=ANYTHING)
def test_any_value_that_a_flow_is_given_is_taken_as_it_is_or_told(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
) -> None:
    params = tmp_path_factory.getbasetemp() / "params.yaml"
    params.write_text(TEXT, encoding="utf-8")
    try:
        apply_overrides(params, as_overrides({key: value}))
    except UserError as error:
        assert key in str(error)
        assert params.read_text(encoding="utf-8") == TEXT
    else:
        found = flatten(load_settings(params))[key]
        assert found == (os.path.expanduser(value) if key == "data.source" else value)


@settings(BUDGET, max_examples=200)
@given(
    place=st.integers(0, len(TEXT.encode())),
    length=st.integers(0, 40),
    put=st.binary(max_size=8)
    | st.sampled_from([b"\0", b"\xff", b"\xef\xbb\xbf", b"\t", b"\r", b"\xe2\x80\xa8", b"&a", b"*a"]),
)
def test_any_bytes_are_taken_or_told(
    tmp_path_factory: pytest.TempPathFactory, place: int, length: int, put: bytes
) -> None:
    params = tmp_path_factory.getbasetemp() / "params.yaml"
    content = TEXT.encode()
    params.write_bytes(content[:place] + put + content[place + length :])
    try:
        assert isinstance(load_settings(params), Settings)
    except UserError as error:
        assert str(params) in str(error)


@pytest.mark.parametrize(
    "text", ["😀: b", "a\u2028b", "é #x", "1e-5", "null", " lead", "2026-01-01", ".nan", "it's", '"', "[a"]
)
def test_text_comes_through_a_file_of_settings_as_it_is(text: str) -> None:
    (override,) = as_overrides({"data.source": text})
    assert read_yaml(override.partition("=")[2], "") == text


def test_through_the_real_command_line(
    params: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (bomb := params.parent / "bomb.yaml").write_text(MULTIPLIED["mappings"])
    monkeypatch.chdir(params.parent)
    for words, expected in (
        (("run", "-S", "data.source=\udcff"), "data.source"),
        (("run", "--settings", str(bomb)), f"{bomb}, line"),
        (("run", "-S", "seed=!!python/object/apply:os.system [touch executed]"), "is not valid YAML"),
    ):
        assert main(list(words)) == 2
        said = capsys.readouterr().err
        assert said.startswith("unfreeze: ") and expected in said
    left = {file.name for file in params.parent.iterdir()} - {".unfreeze"}  # the folder of the workspace's lock
    assert left == {"bomb.yaml", "params.yaml"}


def test_in_a_process_of_its_own(params: Path) -> None:
    params.write_text(written("head.dropout", "&a [*a]"), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent.parent)}
    command = [sys.executable, "-m", "flows.cli", "check"]
    done = subprocess.run(command, cwd=params.parent, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("unfreeze: params.yaml, line") and done.stderr.count("\n") == 1
