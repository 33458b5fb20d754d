"""Find labels that may be mistakes: spellings of one class, missing values, several labels in one."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

from unfreeze.data.folders import named

MISSING = frozenset(("nan", "-nan", "none", "null", "nil", "na", "n/a", "#n/a", "<na>", "nat", "undefined", "-", "?"))
"""Spellings of a missing value in tables."""
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")


def look_alikes(labels: Iterable[str]) -> list[str]:
    """Notes on labels that may mean the same class, and how they differ."""
    groups: dict[str, list[str]] = defaultdict(list)
    for label in sorted(set(labels)):
        groups[_plain(label).casefold()].append(label)
    return [
        f"These {len(group)} classes may be the same, as their names differ {_difference(group)}: {named(group)}."
        for group in groups.values()
        if len(group) > 1
    ]


def _plain(label: str) -> str:
    """Label in normal form: Unicode NFKC, no invisible characters, one blank between words, numbers as floats."""
    text = "".join(c for c in unicodedata.normalize("NFKC", label) if unicodedata.category(c) != "Cf")
    return repr(float(text)) if NUMBER.fullmatch(text.strip()) else re.sub(r"[\s_-]+", " ", text).strip()


def _difference(labels: list[str]) -> str:
    if all(NUMBER.fullmatch(label) for label in labels):
        return "only as text, not as numbers"
    capitals = len({_plain(label) for label in labels}) > 1
    blanks = len({label.casefold() for label in labels}) > 1
    return "only in " + " and ".join(
        ["capitals"] * capitals + ["blanks, hyphens or characters that cannot be seen"] * blanks
    )


def strange_labels(labels: Iterable[str]) -> list[str]:
    """Notes on labels of a table that may be missing values, or several labels in one cell."""
    known = sorted(set(labels))
    missing = [label for label in known if label.casefold() in MISSING]
    several = [label for label in known if _is_several(label, {name.casefold() for name in known})]
    return [
        f"{what}: {named(which)}."
        for what, which in (
            ("Taken as names of classes, though they look like missing values", missing),
            ("Taken as one class each, though they look like several labels in a cell", several),
        )
        if which
    ]


def _is_several(label: str, known: set[str]) -> bool:
    """Whether a label is a list, or consists of several words, at least half of which are labels themselves."""
    if re.fullmatch(r"[\[({].*[\])}]", label) or re.search(r"[|;]", label):
        return True
    parts = [part for part in re.split(r"[\s,/&+]+", label.casefold()) if part]
    return len(set(parts)) > 1 and 2 * sum(part in known for part in parts) >= len(parts)
