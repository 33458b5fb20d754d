"""Change values in `params.yaml`, keeping its comments, as `dvc exp run -S` does."""

import difflib
import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.representer import RoundTripRepresenter

from unfreeze.errors import UserError
from unfreeze.settings import flatten, parse_text, read_text
from unfreeze.yaml12 import read_yaml


def apply_overrides(path: str | Path, overrides: list[str]) -> None:
    """Set ``section.key=value`` pairs in a file of settings, all or none.

    Args:
        path: the file.
        overrides: for example ``["train_full.cycles=2", "lr_find.rate=null"]``; values are YAML 1.2.

    Raises:
        UserError: there is no such key, or the settings would be wrong with these values; nothing is written then.
    """
    text = read_text(path)
    yaml = _yaml()
    try:
        content = yaml.load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        parse_text(text, str(path))  # says the same with the line
        raise UserError(f"{path} is not valid YAML: {_problem(error)}.") from None
    if not isinstance(content, Mapping):
        parse_text(text, str(path))
    for override in overrides:
        _set(content, override, str(path))
    buffer = io.StringIO()
    yaml.dump(content, buffer)
    parse_text(buffer.getvalue(), str(path))
    if buffer.getvalue() != text:
        _replace(Path(path).resolve(), buffer.getvalue())


def read_overrides(path: str | Path) -> list[str]:
    """The values in a file that is like `params.yaml` but has only the keys to change, for `apply_overrides`.

    Raises:
        UserError: there is no such file, or it is not a YAML mapping.
    """
    content = read_yaml(read_text(path), str(path))
    if not isinstance(content, Mapping):
        raise UserError(f"{path} must be a mapping of keys to values, as params.yaml is.")
    return as_overrides(flatten(content))


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """``section.key -> value`` as `apply_overrides` takes them; text is quoted only where it has to be."""

    def written(value: Any) -> str:
        plain = isinstance(value, str) and value.strip() and read_yaml(f"- {value}", "") == [value]
        return value if plain else json.dumps(value)

    return [f"{key}={written(value)}" for key, value in values.items()]


def _set(content: Any, override: str, path: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals:
        raise UserError(f"{override}: write it as key=value, for example train_full.cycles=2.")
    known = flatten(content)
    if key not in known:
        near = difflib.get_close_matches(key, known, 1, 0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"{override}: {path} has no key {key!r}.{hint}")
    *sections, last = key.split(".")
    for section in sections:
        content = content[section]
    try:
        # A key without a value would be null, which turns some settings off: that has to be said.
        value = _yaml().load(text) if text.strip() else ""
        # DVC does not know ~, and a shell leaves it as it is after the equals sign.
        content[last] = os.path.expanduser(value) if key == "data.source" and isinstance(value, str) else value
    except (YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{override}: {text!r} is not valid YAML: {_problem(error)}.") from None


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        shutil.copymode(path, partial)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None


def _problem(error: Exception) -> str:
    return str(error.problem) if isinstance(error, MarkedYAMLError) else " ".join(str(error).split())


class _Representer(RoundTripRepresenter):
    """Writes null as it stands in the file, not as nothing."""

    def represent_null(self, data: None) -> Any:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_Representer.add_representer(type(None), _Representer.represent_null)


def _yaml() -> YAML:
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.preserve_quotes = True
    yaml.width = 4096  # no line is broken
    return yaml
