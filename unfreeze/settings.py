"""The settings of the recipe: a typed, validated model of `params.yaml`.

One dataclass per section, one field per key; what a key may be stands beside it. Everything that is wrong is reported
at once, before anything expensive starts.
"""

import dataclasses
import difflib
import os
import re
import reprlib
import types
import typing
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from unfreeze.errors import UserError
from unfreeze.yaml12 import read_yaml

S = TypeVar("S")

KINDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
UNSEEN = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories of what is no character of a text: controls, line breaks, halves of a character."""


@dataclass(frozen=True)
class In:
    """A number between two ends; the ends count unless they are said to be open."""

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
        return "one of " + ", ".join(self.words)


@dataclass(frozen=True)
class Without:
    """Text in which some characters must not be."""

    characters: str

    def __contains__(self, value: str) -> bool:
        return not set(value) & set(self.characters)

    def __str__(self) -> str:
        return "without " + " and ".join(self.characters)


Count = Annotated[int, In(1, 10_000)]
Rate = Annotated[float, In(0, 1000, open_low=True)]
Rule = Annotated[str, OneOf(("minimum", "steepest", "valley"))]
ScheduleName = Annotated[str, OneOf(("sgdr", "one_cycle", "step", "constant"))]


@dataclass(frozen=True)
class Data:
    """Where the images are, and how they are split and packed."""

    source: str
    image_size: Annotated[int, In(32, 1024)]
    valid: Annotated[float, In(0, 1, open_low=True, open_high=True)]
    test: Annotated[float, In(0, 1, open_high=True)]
    max_broken: Annotated[float, In(0, 1)]
    max_megapixels: Annotated[float, In(0, 100_000, open_low=True)]


@dataclass(frozen=True)
class Backbone:
    """The pretrained network and where its weights come from."""

    name: str
    weights: str


@dataclass(frozen=True)
class Head:
    """The classifier on top of the backbone."""

    dropout: Annotated[float, In(0, 1, open_high=True)]


@dataclass(frozen=True)
class Augment:
    """How much a training image is changed."""

    flip: Annotated[str, OneOf(("none", "horizontal", "both", "dihedral"))]
    rotate: Annotated[float, In(0, 180)]
    zoom: Annotated[float, In(1, 4)]
    lighting: Annotated[float, In(0, 1)]


@dataclass(frozen=True)
class Train:
    """What all trainings share."""

    optimizer: Annotated[str, OneOf(("adamw", "sgd"))]
    weight_decay: Annotated[float, In(0, 1)]
    label_smoothing: Annotated[float, In(0, 1, open_high=True)]


@dataclass(frozen=True)
class LRFind:
    """LR range test: the sweep's ends and length, the rule that picks, or a rate that overrides it."""

    start: Rate
    end: Rate
    iterations: Annotated[int, In(10, 10_000)]
    pick: Rule
    rate: Rate | None


@dataclass(frozen=True)
class TrainHead:
    """Head on precomputed activations."""

    epochs: Count


@dataclass(frozen=True)
class TrainAugmented:
    """Head on augmented images."""

    schedule: ScheduleName
    cycles: Annotated[int, In(1, 100)]
    cycle_len: Count
    cycle_mult: Annotated[int, In(1, 10)]

    @property
    def epochs(self) -> int:
        """Epochs in all cycles, each ``cycle_mult`` times as long as the one before."""
        return sum(self.cycle_len * self.cycle_mult**i for i in range(self.cycles))


@dataclass(frozen=True)
class Unfreeze:
    """Which layer groups of the whole network train, and how their rates differ."""

    freeze_to: Annotated[int, In(0, 2)]
    lr_ratio: Annotated[float, In(1, 1000)]
    bn_freeze: bool


@dataclass(frozen=True)
class UnfreezeLRFind(LRFind):
    """LR range test of the unfrozen network."""


@dataclass(frozen=True)
class TrainFull(TrainAugmented):
    """Whole network; with `until_overfitting` the number of cycles is a maximum."""

    until_overfitting: bool


@dataclass(frozen=True)
class Evaluate:
    """How the result is judged."""

    tta_views: Annotated[int, In(1, 64)]


@dataclass(frozen=True)
class Register:
    """The name of the registered model, which MLflow wants to put into addresses."""

    model_name: Annotated[str, Without("/:")]


@dataclass(frozen=True)
class CheckpointSettings:
    """How often a training notes how far it has come; not a part of the recipe, so it makes no step stale."""

    seconds: Annotated[float, In(0, 86_400)]
    batches: Annotated[int, In(1, 1_000_000)] | None


@dataclass(frozen=True)
class Settings:
    """Everything in `params.yaml`."""

    seed: Annotated[int, In(0, 2**31 - 1)]
    batch_size: Annotated[int, In(2, 65_536)]
    data: Data
    backbone: Backbone
    head: Head
    augment: Augment
    train: Train
    lr_find: LRFind
    train_head: TrainHead
    train_augmented: TrainAugmented
    unfreeze: Unfreeze
    unfreeze_lr_find: UnfreezeLRFind
    train_full: TrainFull
    evaluate: Evaluate
    register: Register
    checkpoint: CheckpointSettings


def load_settings(path: str | Path = "params.yaml") -> Settings:
    """Read and check a file of settings.

    Raises:
        UserError: the file is missing, is no YAML, or anything in it is wrong; names every key that is.
    """
    return parse_text(read_text(path), str(path))


def read_text(path: str | Path) -> str:
    """The text of a file of settings. Raises UserError where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} cannot be read: it is not UTF-8 text. Save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Run this in the project's folder.") from None


def parse_text(text: str, where: str = "params.yaml") -> Settings:
    """Read and check settings written as YAML 1.2. Arguments and errors as for `parse_settings`."""
    content = read_yaml(text, where)
    if content is None:
        raise UserError(f"{where} is empty; it must have the sections {', '.join(_hints(Settings))}.")
    return parse_settings(content, where)


def parse_settings(content: object, where: str = "params.yaml") -> Settings:
    """Check settings as they come from YAML and give them types.

    Args:
        content: a mapping of sections.
        where: the file's name, for the messages.

    Raises:
        UserError: lists every key that is missing, unknown or has a wrong value.
    """
    problems: list[str] = []
    settings = _section(Settings, content, "", problems)
    if settings is not None:
        problems += _across(settings)
    if settings is None or problems:
        raise UserError(f"{where}: " + (problems[0] if len(problems) == 1 else "\n  - ".join(["", *problems])))
    return settings


def parse_section(kind: type[S], content: object, name: str, where: str) -> S:
    """Check one section of settings that is kept somewhere else than in `params.yaml`.

    Args:
        kind: the section's type, such as `Augment`.
        content: a mapping of keys to values.
        name: the section's name, for the message.
        where: what keeps it, for the message.

    Raises:
        UserError: lists, in one line, every key that is missing, unknown or has a wrong value.
    """
    problems: list[str] = []
    section = _section(kind, content, f"{name}.", problems)
    if section is None:
        raise UserError(f"{where}: {' '.join(problems)}")
    return section


def flatten(settings: object, prefix: str = "") -> dict[str, Any]:
    """Settings as ``section.key -> value``."""
    items = settings.items() if isinstance(settings, Mapping) else _fields(settings)
    flat: dict[str, Any] = {}
    for key, value in items:
        nested = dataclasses.is_dataclass(value) or isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _fields(settings: Any) -> Iterator[tuple[str, Any]]:
    return ((field.name, getattr(settings, field.name)) for field in dataclasses.fields(settings))


def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _keys() -> Iterator[str]:
    """Every key that `params.yaml` has, as ``section.key``."""
    for name, kind in _hints(Settings).items():
        keys = _hints(typing.cast(type, kind)) if dataclasses.is_dataclass(kind) else None
        yield from [name] if keys is None else [f"{name}.{key}" for key in keys]


def _section(kind: type[S], content: object, prefix: str, problems: list[str]) -> S | None:
    """One section of settings, or None with the problems found."""
    what = prefix.rstrip(".") or "the file"
    if not isinstance(content, Mapping):
        problems.append(f"{what} must be a mapping of keys to values, not {_shown(content)}.")
        return None
    hints, before = _hints(kind), len(problems)
    for key in content:
        if key not in hints:
            name = key if isinstance(key, str) else _shown(key)
            near = [prefix + known for known in difflib.get_close_matches(name, hints, 1, 0.6)]
            near += [known for known in _keys() if known.rpartition(".")[2] == name]
            hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(hints)}."
            problems.append(f"{prefix}{name} is not a setting. {hint}")
    values: dict[str, Any] = {}
    for key, hint in hints.items():
        if key not in content:
            problems.append(f"{prefix}{key} is missing.")
        elif dataclasses.is_dataclass(hint):
            values[key] = _section(typing.cast(type, hint), content[key], f"{prefix}{key}.", problems)
        else:
            values[key] = _value(hint, content[key], f"{prefix}{key}", problems)
    return kind(**values) if len(problems) == before else None


def _value(hint: Any, value: object, key: str, problems: list[str]) -> Any:
    """A single value with the type and range of its field; what is wrong goes to the problems."""
    nullable = typing.get_origin(hint) in (types.UnionType, typing.Union)
    if nullable and value is None:
        return None
    if nullable:
        hint = typing.get_args(hint)[0]
    kind, limit = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint, None)
    typed = _typed(kind, value)
    if typed is not None and (limit is None or typed in limit):
        return typed
    allowed = str(limit) if isinstance(limit, OneOf) else ", ".join(filter(None, (KINDS[kind], str(limit or ""))))
    problem = f"{key} is {_shown(value)}, but must be {allowed}{', or null' if nullable else ''}."
    if isinstance(limit, OneOf) and (near := difflib.get_close_matches(str(typed), limit.words, 1)):
        problem += f" Did you mean {near[0]}?"
    elif kind is str and value is not None and not isinstance(value, str | Mapping | list):
        problem += " Put it in quotes."
    elif isinstance(value, str) and _unseen(value):
        problem += " There are control characters or line breaks in it."
    problems.append(problem)
    return None


EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def _typed(kind: type, value: object) -> Any:
    """The value as one of ``kind``, or None where it is not: no truth value is a number, no quoted number either."""
    if isinstance(value, bool) and kind is not bool:
        return None
    if kind is float:
        if isinstance(value, str) and EXPONENT.fullmatch(value):
            value = float(value)  # readers of YAML 1.1 take 1e-5 for text
        try:
            return float(value) if isinstance(value, int | float) else None
        except OverflowError:
            return None
    if not isinstance(value, kind) or (isinstance(value, str) and (not value.strip() or _unseen(value))):
        return None
    return kind(value)


def _unseen(text: str) -> bool:
    return any(unicodedata.category(character) in UNSEEN for character in text)


_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlist, _short.maxdict = 2, 80, 80, 4, 4


def _shown(value: object) -> str:
    """A value as a message shows it: as in YAML, and never longer than a line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    try:
        return _short.repr(value)
    except ValueError:
        return "a number of thousands of digits"  # which Python refuses to write out


def _across(settings: Settings) -> list[str]:
    """Problems between keys."""
    problems = []
    if settings.data.source.startswith("~"):
        full = os.path.expanduser(settings.data.source)
        problems.append(f"data.source is {settings.data.source}, but DVC does not know ~; write {full}.")
    if settings.data.valid + settings.data.test >= 1:
        problems.append("data.valid and data.test together leave nothing to train on; their sum must be below 1.")
    for name in ("lr_find", "unfreeze_lr_find"):
        sweep = getattr(settings, name)
        if sweep.start >= sweep.end:
            problems.append(f"{name}.start is {sweep.start:g}, but must be below {name}.end, {sweep.end:g}.")
    for name in ("train_augmented", "train_full"):
        if getattr(settings, name).epochs > 10_000:
            problems.append(f"{name}: cycles, cycle_len and cycle_mult make more than 10000 epochs; lower one of them.")
    return problems
