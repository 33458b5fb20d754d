"""Change values in `params.yaml`, keeping its comments, as `dvc exp run -S` does."""

import difflib
import io
import os
from pathlib import Path
from typing import Any

from unfreeze.errors import UserError
from unfreeze.settings import flatten, parse_settings


def apply_overrides(path: str | Path, overrides: list[str]) -> None:
    """Set ``section.key=value`` pairs in a file of settings, all or none.

    Args:
        path: the file.
        overrides: for example ``["train_full.cycles=2", "lr_find.rate=null"]``; values are YAML.

    Raises:
        UserError: there is no such key, or the settings would be wrong with these values.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    path = Path(path)
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 200
    try:
        content = yaml.load(path.read_text(encoding="utf-8"))
        for override in overrides:
            _set(content, override, yaml)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}. Run this in the project's folder.") from None
    except YAMLError as error:
        raise UserError(
            f"{path}, or a value given with -S, is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    buffer = io.StringIO()
    yaml.dump(content, buffer)
    parse_settings(YAML(typ="safe").load(buffer.getvalue()), str(path))
    if buffer.getvalue() != path.read_text(encoding="utf-8"):
        partial = path.with_name(path.name + ".partial")
        partial.write_text(buffer.getvalue(), encoding="utf-8")
        os.replace(partial, path)


def _set(content: Any, override: str, yaml: Any) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    known = flatten(content)
    if not equals:
        raise UserError(f"-S {override}: write it as key=value, for example train_full.cycles=2.")
    if key not in known:
        near = difflib.get_close_matches(key, known, 1, 0.5)
        raise UserError(
            f"-S {override}: params.yaml has no key {key!r}." + (f" Did you mean {near[0]}?" if near else "")
        )
    *sections, last = key.split(".")
    for section in sections:
        content = content[section]
    value = yaml.load(text) if text.strip() else ""
    if value != content[last]:
        content[last] = value
