"""Reads YAML 1.2, as DVC does, where PyYAML by itself reads 1.1: 1e-5 is a number, 010 is ten, `no` is text.

What stands in `params.yaml` must mean the same to the step that runs as to DVC, which decides whether it has to run.
"""

import re
from collections.abc import Hashable
from typing import Any, ClassVar

import yaml

from unfreeze.errors import UserError

LEVELS = 50
"""Levels of nesting, beyond which a file is no file of settings."""
VALUES = 10_000
"""Values in a file, counted as often as aliases name them: a few lines of aliases of aliases can make billions."""


def read_yaml(text: str, where: str) -> Any:
    """The content of a YAML file; nothing in it is executed.

    Args:
        text: of the file.
        where: the file's name, for the messages.

    Raises:
        UserError: it is no YAML, holds more than values of the core schema (dates, bytes, objects), or a key stands twice
            in a mapping; names the line.
    """
    loader = None
    try:
        loader = _Loader(text)  # a SafeLoader
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line if error.problem_mark else loader.line if loader else 0
        what = error.problem or error.context
    except yaml.reader.ReaderError as error:
        line, what = text.count("\n", 0, error.position), f"the character U+{ord(text[error.position]):04X} in it"
    except (ValueError, OverflowError):  # an escape sequence for a character that does not exist
        line, what = loader.line if loader else 0, "an escape sequence that is no character"
    if conflict := re.search(r"^<<<<<<< ", text, re.MULTILINE):
        line, what = text.count("\n", 0, conflict.start()), "a merge's conflict, which is to be resolved"
    raise UserError(f"{where}, line {line + 1} is not valid YAML: {what}.")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}
    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.level = 0
        self.sizes: dict[int, int] = {}  # values in each node that is complete, aliases written out

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark, alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        self.level += 1
        if self.level > LEVELS:
            raise yaml.composer.ComposerError(None, None, f"more than {LEVELS} levels", mark)
        node = super().compose_node(parent, index)
        self.level -= 1
        if alias and id(node) not in self.sizes:
            raise yaml.composer.ComposerError(None, None, "an alias stands within what it names", mark)
        parts: list[Any] = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        size = self.sizes.setdefault(id(node), 1 + sum(self.sizes[id(part)] for part in parts))
        if size > VALUES:
            raise yaml.composer.ComposerError(None, None, f"more than {VALUES} values", mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):  # whatever a value unlike its tag trips
            problem = f"{str(node.value)[:40]!r} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

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
