"""Read YAML with ruamel.yaml's safe loader, as DVC does.

`params.yaml` must mean the same to a step as to DVC, which decides whether the step has to run. Files with nested
aliases that expand to huge content, or with deep nesting, are refused.
"""

import re
from collections.abc import Hashable
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode
from ruamel.yaml.reader import ReaderError

from unfreeze.errors import UserError

LEVELS = 50
"""Largest number of nesting levels in a settings file."""
VALUES = 10_000
"""Largest number of values in a file after expanding aliases: a few lines of nested aliases can make billions."""


def read_yaml(text: str, where: str) -> Any:
    """The content of a YAML file; nothing in it is executed.

    Args:
        text: the file's text.
        where: the file's name, for the messages.

    Raises:
        UserError: the text is not YAML, or a mapping has a key twice; the message names the line.
    """
    loader: Any = YAML(typ="safe", pure=True)
    loader.Composer, loader.Constructor = _Composer, _Constructor
    try:
        return loader.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, what = mark.line if mark else 0, error.problem or error.context
    except ReaderError as error:
        line, what = text.count("\n", 0, error.position), f"the character U+{ord(text[error.position]):04X} in it"
    except (ValueError, OverflowError):  # an escape sequence for a character that does not exist
        line, what = loader.reader.line, "an escape sequence that is no character"
    if conflict := re.search(r"^<<<<<<< ", text, re.MULTILINE):
        line, what = text.count("\n", 0, conflict.start()), "an unresolved merge conflict"
    raise UserError(f"{where}, line {line + 1} is not valid YAML: {what}.")


class _Composer(Composer):
    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self.level = 0
        self.sizes: dict[int, int] = {}  # number of values in each complete node, with aliases expanded

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        mark, alias = self.parser.peek_event().start_mark, self.parser.check_event(AliasEvent)
        self.level += 1
        if self.level > LEVELS:
            raise ComposerError(None, None, f"more than {LEVELS} levels", mark)
        node = super().compose_node(parent, index)
        self.level -= 1
        if alias and id(node) not in self.sizes:
            raise ComposerError(None, None, "an alias is inside the node that it refers to", mark)
        parts: list[Any] = node.value if isinstance(node, CollectionNode) else []
        if isinstance(node, MappingNode):
            parts = [part for pair in parts for part in pair]
        size = self.sizes.setdefault(id(node), 1 + sum(self.sizes[id(part)] for part in parts))
        if size > VALUES:
            raise ComposerError(None, None, f"more than {VALUES} values", mark)
        return node


class _Constructor(SafeConstructor):
    def construct_object(self, node: Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):  # a value that does not fit its tag
            problem = f"{str(node.value)[:40]!r} is no {str(node.tag).rpartition(':')[2]}"
            raise ConstructorError(None, None, problem, node.start_mark) from None

    def check_mapping_key(self, node: Any, key_node: Any, mapping: Any, key: Hashable, value: Any) -> bool:
        if key in mapping:
            lines = [
                k.start_mark.line + 1 for k, _ in node.value if isinstance(k, ScalarNode) and k.value == key_node.value
            ]
            problem = f"the key {key_node.value} occurs twice, first in line {lines[0]}"
            raise ConstructorError(None, None, problem, key_node.start_mark)
        return True
