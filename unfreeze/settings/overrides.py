"""Change values in `params.yaml`, keeping its comments, as `dvc exp run -S` does."""

import contextlib
import difflib
import io
import json
import math
import os
import re
import reprlib
import shutil
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.scalarstring import FoldedScalarString, LiteralScalarString

from unfreeze.errors import UserError
from unfreeze.persistence.atomic import put_in_place
from unfreeze.settings.schema import Settings, flatten, parse_text, read_text
from unfreeze.settings.yaml_loader import read_yaml

UNSEEN = re.compile(r"[\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Characters that JSON does not escape, but that YAML reads as a line break, or rejects."""


def apply_overrides(
    path: str | Path, overrides: list[str], check: Callable[[Settings], object] = lambda settings: None
) -> None:
    """Set ``section.key=value`` pairs in a file of settings, all or none.

    Args:
        path: the file.
        overrides: for example ``["train_full.cycles=2", "lr_find.rate=null"]``; values are YAML 1.2.
        check: raises UserError if the changed settings must not be saved; not called if nothing changes.

    Raises:
        UserError: a key does not exist, or the settings would be invalid with these values. The file is unchanged then.
    """
    text = with_overrides(path, overrides)
    settings = parse_text(text, str(path))
    if text != read_text(path):
        check(settings)
        _replace(Path(path).resolve(), text)


@contextlib.contextmanager
def put_back_on_error(path: str | Path) -> Iterator[None]:
    """Restore a file of settings if the block ends with an error. Raises UserError if it cannot be read."""
    read_text(path)
    file = Path(path).resolve()
    before = file.read_bytes()
    try:
        yield
    except BaseException:
        if file.read_bytes() != before:
            _replace(file, before.decode())
        raise


def with_overrides(path: str | Path, overrides: list[str]) -> str:
    """The text of a file of settings with some values changed. Arguments and errors as for `apply_overrides`."""
    text = read_text(path)
    if not isinstance(read_yaml(text, str(path)), Mapping):
        parse_text(text, str(path))  # raises an error that says why
    yaml = _yaml()
    try:
        content = yaml.load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {_problem(error)}.") from None
    for override in overrides:
        _set(content, override, str(path))
    buffer = io.StringIO()
    yaml.dump(content, buffer)
    return buffer.getvalue()


def read_overrides(path: str | Path) -> list[str]:
    """Read overrides for `apply_overrides` from a file like `params.yaml` that has only the keys to change.

    Raises:
        UserError: there is no such file, or it is not a YAML mapping.
    """
    content = read_yaml(read_text(path), str(path))
    if not isinstance(content, Mapping):
        raise UserError(f"{path} must be a mapping of keys to values, as params.yaml is.")
    return as_overrides(flatten(content))


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """Convert a mapping of ``section.key`` to value into overrides for `apply_overrides`; quote text only if needed.

    Raises:
        UserError: a value has a type that no setting has, such as a mapping.
    """
    return [f"{key}={_written(key, value)}" for key, value in values.items()]


def _written(key: str, value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 2**63 else hex(value)  # Python refuses to write thousands of digits
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else {"inf": ".inf", "-inf": "-.inf"}.get(str(value), ".nan")
    if isinstance(value, list) and all(isinstance(part, int | float) for part in value):
        return f"[{', '.join(_written(key, part) for part in value)}]"
    if not isinstance(value, str):
        raise UserError(
            f"{key} is {reprlib.repr(value)}, but every setting is a number, text, true, false, null or [low, high]."
        )
    try:
        plain = bool(value.strip()) and read_yaml(f"- {value}", "") == [value]
    except UserError:
        plain = False
    return (
        value if plain else UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))
    )


def _set(content: Any, override: str, path: str) -> None:
    key, equals, text = override.partition("=")
    key, shown = key.strip(), _short(override)
    if not equals:
        raise UserError(f"{shown}: write it as key=value, for example train_full.cycles=2.")
    *sections, last = key.split(".")
    target: Any = content
    for section in sections:
        target = target.get(section) if isinstance(target, Mapping) else None
    if not isinstance(target, MutableMapping) or last not in target or isinstance(target[last], Mapping):
        near = difflib.get_close_matches(key[:80], flatten(content), 1, 0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"{shown}: {path} has no key {_short(key)!r}.{hint}")
    read_yaml(text, f"{shown}: {_short(text)!r}")  # rejects what is not a value
    try:
        # An empty value would be null, which turns some settings off: null must be written out.
        value = _yaml().load(text) if text.strip() else ""
    except (YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{shown}: {_short(text)!r} is not valid YAML: {_problem(error)}.") from None
    if isinstance(value, LiteralScalarString | FoldedScalarString):
        value = str(value)  # on one line, as all other values
    # DVC does not expand ~, and neither does a shell after the equals sign.
    target[last] = os.path.expanduser(value) if key == "data.source" and isinstance(value, str) else value


def _short(text: str) -> str:
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= 100 else text[:99] + "…"


def _replace(path: Path, text: str) -> None:
    """Write a file atomically."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        shutil.copymode(path, partial)
        put_in_place(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None


def _problem(error: Exception) -> str:
    return str(error.problem) if isinstance(error, MarkedYAMLError) else " ".join(str(error).split())


class _Representer(RoundTripRepresenter):
    """Writes null as ``null``, not as an empty value."""

    def represent_null(self, data: None) -> Any:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_Representer.add_representer(type(None), _Representer.represent_null)


def _yaml() -> YAML:
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.preserve_quotes = True
    yaml.width = 4096  # do not wrap lines
    return yaml
