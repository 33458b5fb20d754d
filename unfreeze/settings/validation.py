"""Validate settings: their types and limits, and the error messages.

Settings are dataclasses: one for each section, with a field for each key, annotated with its type and its limit.
"""

import dataclasses
import difflib
import math
import re
import reprlib
import types
import typing
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

S = TypeVar("S")

KINDS: dict[type, str] = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "[low, high], two numbers",
    types.NoneType: "null",
}  # fmt: skip
UNSEEN = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories that are not allowed in text: control characters, line breaks, surrogates."""
EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


@dataclass(frozen=True)
class In:
    """A number in an interval, which includes its ends unless they are marked as open."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        above, below = "above" if self.open_low else "at least", "below" if self.open_high else "at most"
        return f"{above} {self.low} and {below} {self.high}"


@dataclass(frozen=True)
class OneOf:
    """One of a few words."""

    words: tuple[str, ...]

    def __contains__(self, value: object) -> bool:
        return value in self.words

    def __str__(self) -> str:
        return "one of " + ", ".join(self.words) if len(self.words) > 1 else self.words[0]


@dataclass(frozen=True)
class Rising:
    """Two finite numbers, the first below the second."""

    def __contains__(self, value: tuple[float, float]) -> bool:
        return -math.inf < value[0] < value[1] < math.inf

    def __str__(self) -> str:
        return "the first below the second"


@dataclass(frozen=True)
class Without:
    """Text without certain characters."""

    characters: str

    def __contains__(self, value: str) -> bool:
        return not set(value) & set(self.characters)

    def __str__(self) -> str:
        return "without " + " and ".join(self.characters)


def hints(section: type) -> dict[str, Any]:
    """The annotation of each key of a section."""
    return typing.get_type_hints(section, include_extras=True)


def key_names(settings: type) -> Iterator[str]:
    """Every key: as ``section.key``, or its name alone if it is in no section."""
    for name, kind in hints(settings).items():
        keys = hints(typing.cast(type, kind)) if dataclasses.is_dataclass(kind) else None
        yield from [name] if keys is None else [f"{name}.{key}" for key in keys]


def check_section(kind: type[S], content: object, prefix: str, known: Collection[str], problems: list[str]) -> S | None:
    """One section of settings, with the types of its fields; None if anything in it is wrong.

    Args:
        kind: the section's dataclass.
        content: the section as read: a mapping of keys to values.
        prefix: prefix of its keys in messages, such as ``augment.``.
        known: every key of all sections, to recognise a key in the wrong section.
        problems: gets a sentence for every key that is missing, unknown or has a wrong value.
    """
    what = prefix.rstrip(".") or "the file"
    if not isinstance(content, Mapping):
        problems.append(f"{what} must be a mapping of keys to values, not {_shown(content)}.")
        return None
    keys, before = hints(kind), len(problems)
    problems += [_unknown(key, prefix, keys, known) for key in content if key not in keys]
    values: dict[str, Any] = {}
    for key, hint in keys.items():
        if key not in content:
            problems.append(f"{prefix}{key} is missing.")
        elif dataclasses.is_dataclass(hint):
            values[key] = check_section(typing.cast(type, hint), content[key], f"{prefix}{key}.", known, problems)
        else:
            values[key] = _value(hint, content[key], f"{prefix}{key}", problems)
    return kind(**values) if len(problems) == before else None


def _unknown(key: object, prefix: str, keys: Collection[str], known: Collection[str]) -> str:
    """Error message for a key that a section does not have."""
    name = key if isinstance(key, str) else _shown(key)
    near = [prefix + close for close in difflib.get_close_matches(name, keys, 1, 0.6)]
    near += [elsewhere for elsewhere in known if elsewhere.rpartition(".")[2] == name]
    hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(keys)}."
    return f"{prefix}{name} is not a setting. {hint}"


def _value(hint: Any, value: object, key: str, problems: list[str]) -> Any:
    """A single value with the type of its field; a wrong value is reported in ``problems``, and None returned."""
    several = typing.get_origin(hint) in (types.UnionType, typing.Union)
    choices = [_kind_and_limit(one) for one in (typing.get_args(hint) if several else (hint,))]
    if value is None and (types.NoneType, None) in choices:
        return None
    for kind, limit in choices:
        typed = _typed(kind, value)
        if typed is not None and (limit is None or typed in limit):
            return typed
    problem = f"{key} is {_shown(value)}, but must be {', or '.join(_allowed(*choice) for choice in choices)}."
    kind, limit = choices[0]
    words = limit.words if isinstance(limit, OneOf) and isinstance(value, str) else ()
    if words and (near := difflib.get_close_matches(str(value), words, 1)):
        problem += f" Did you mean {near[0]}?"
    elif choices == [(str, limit)] and value is not None and not isinstance(value, str | Mapping | list):
        problem += " Put it in quotes."
    elif isinstance(value, str) and _unseen(value):
        problem += " There are control characters or line breaks in it."
    problems.append(problem)
    return None


def _allowed(kind: type, limit: object) -> str:
    return str(limit) if isinstance(limit, OneOf) else ", ".join(filter(None, (KINDS[kind], str(limit or ""))))


def _kind_and_limit(hint: Any) -> tuple[type, Any]:
    """The type of a field, and its limit, if any."""
    if typing.get_origin(hint) is not Annotated:
        return hint, None
    kind, limit = typing.get_args(hint)
    return typing.get_origin(kind) or kind, limit


def _typed(kind: type, value: object) -> Any:
    """The value converted to ``kind``, or None if it has another type: booleans and quoted numbers are not numbers."""
    if isinstance(value, bool) and kind is not bool:
        return None
    if kind is tuple:
        numbers = [_typed(float, part) for part in value] if isinstance(value, list | tuple) else []
        return tuple(numbers) if len(numbers) == 2 and None not in numbers else None
    if kind is float:
        if isinstance(value, str) and EXPONENT.fullmatch(value):
            value = float(value)  # YAML 1.1 parsers read 1e-5 as text
        try:
            return float(value) if isinstance(value, int | float) else None
        except OverflowError:
            return None
    if (
        value is None
        or not isinstance(value, kind)
        or (isinstance(value, str) and (not value.strip() or _unseen(value)))
    ):
        return None
    return kind(value)


def _unseen(text: str) -> bool:
    return any(unicodedata.category(character) in UNSEEN for character in text)


_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlist, _short.maxdict = 2, 80, 80, 4, 4


def _shown(value: object) -> str:
    """A value for a message: as in YAML, and at most a line long."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    try:
        return _short.repr(value)
    except ValueError:
        return "a number of thousands of digits"  # which Python refuses to write out
