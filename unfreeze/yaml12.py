"""Reads YAML 1.2, as DVC does, where PyYAML by itself reads 1.1: 1e-5 is a number, 010 is ten, `no` is text.

What stands in `params.yaml` must mean the same to the step that runs as to DVC, which decides whether it has to run.
"""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from unfreeze.errors import UserError


def read_yaml(text: str, where: str) -> Any:
    """The content of a YAML file; nothing in it is executed.

    Args:
        text: of the file.
        where: the file's name, for the messages.

    Raises:
        UserError: it is no YAML, or a key stands twice in a mapping; names the line.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line} is not valid YAML: {error.problem or error.context}.") from None
    except Exception as error:
        # PyYAML lets out whatever it runs into: values unlike their tag, odd characters, too many levels.
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split()) or type(error).__name__}.") from None


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in lines:
                problem = f"the key {key.value} stands there twice, first in line {lines[key.value]}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


# The core schema of YAML 1.2: type, how it is written, and the characters it can begin with.
for _type, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_type}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)
