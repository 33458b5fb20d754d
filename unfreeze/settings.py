"""The settings of the recipe: a typed, validated model of `params.yaml`.

One dataclass per section, one field per key; what a key may be stands beside it. Everything that is wrong is reported
at once, before anything expensive starts.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from unfreeze.errors import UserError

S = TypeVar("S")

KINDS: dict[type, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    str: (str, "text"),
}


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
        above = f"above {self.low:g}" if self.open_low else f"at least {self.low:g}"
        if math.isinf(self.high):
            return above
        return f"{above} and {'below' if self.open_high else 'at most'} {self.high:g}"


@dataclass(frozen=True)
class OneOf:
    """One of a few words."""

    words: tuple[str, ...]

    def __contains__(self, value: object) -> bool:
        return value in self.words

    def __str__(self) -> str:
        return "one of " + ", ".join(self.words)


Count = Annotated[int, In(1, 10_000)]
Rate = Annotated[float, In(0, 1000, open_low=True)]
Rule = Annotated[str, OneOf(("minimum", "steepest", "valley"))]
ScheduleName = Annotated[str, OneOf(("sgdr", "one_cycle", "step", "constant"))]


def sgdr_epochs(cycles: int, cycle_len: int, cycle_mult: int) -> int:
    """Epochs in ``cycles`` cycles, the first of ``cycle_len`` epochs, each next one ``cycle_mult`` times as long."""
    return sum(cycle_len * cycle_mult**i for i in range(cycles))


@dataclass(frozen=True)
class Data:
    """Where the images are, and how they are split and packed."""

    source: str
    image_size: Annotated[int, In(32, 1024)]
    valid: Annotated[float, In(0, 1, open_low=True, open_high=True)]
    test: Annotated[float, In(0, 1, open_high=True)]
    max_broken: Annotated[float, In(0, 1)]
    max_megapixels: Annotated[float, In(0, math.inf, open_low=True)]


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

    flip: Annotated[str, OneOf(("none", "horizontal", "dihedral"))]
    rotate: Annotated[float, In(0, 180)]
    zoom: Annotated[float, In(1, 4)]
    lighting: Annotated[float, In(0, 1)]


@dataclass(frozen=True)
class Train:
    """What all trainings share."""

    batch_size: Annotated[int, In(2, 65_536)]
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
        """Epochs in all cycles."""
        return sgdr_epochs(self.cycles, self.cycle_len, self.cycle_mult)


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
    """The name of the registered model."""

    model_name: str


@dataclass(frozen=True)
class Settings:
    """Everything in `params.yaml`."""

    seed: Annotated[int, In(0, 2**31 - 1)]
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


def load_settings(path: str | Path = "params.yaml") -> Settings:
    """Read and check a file of settings.

    Raises:
        UserError: the file is missing, is no YAML, or anything in it is wrong; names every key that is.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}. Run this in the project's folder.") from None
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    return parse_settings(content, str(path))


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


def _section(kind: type[S], content: object, prefix: str, problems: list[str]) -> S | None:
    """One section of settings, or None with the problems found."""
    what = prefix.rstrip(".") or "the file"
    if not isinstance(content, Mapping):
        problems.append(f"{what} must be a mapping of keys to values, not {content!r}.")
        return None
    hints = typing.get_type_hints(kind, include_extras=True)
    for key in content:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1, 0.6)
            hint = f"Did you mean {prefix}{near[0]}?" if near else f"There are: {', '.join(hints)}."
            problems.append(f"{prefix}{key} is not a setting. {hint}")
    values, before = {}, len(problems)
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
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = typing.get_args(hint)[0]
    limits: tuple[Any, ...] = ()
    if typing.get_origin(hint) is Annotated:
        hint, *rest = typing.get_args(hint)
        limits = tuple(rest)
    if hint is float and isinstance(value, str):
        value = _number(value)  # YAML 1.1 takes 1e-5 for text
    kind, name = KINDS[hint]
    right = isinstance(value, kind) and (hint is bool or not isinstance(value, bool))
    if right and hint is float:
        right = not math.isnan(typing.cast(float, value))
    if not right or (hint is str and not str(value).strip()):
        allowed = f", {limits[0]}" if limits else ""
        problems.append(f"{key} is {value!r}, but must be {name}{allowed}.")
        return None
    if limits and value not in limits[0]:
        near = difflib.get_close_matches(str(value), limits[0].words, 1) if isinstance(limits[0], OneOf) else []
        hint_text = f" Did you mean {near[0]}?" if near else ""
        problems.append(f"{key} is {value!r}, but must be {limits[0]}.{hint_text}")
        return None
    return float(typing.cast(float, value)) if hint is float else value


def _number(text: str) -> object:
    try:
        return float(text)
    except ValueError:
        return text


def _across(settings: Settings) -> list[str]:
    """Problems between keys."""
    problems = []
    if settings.data.valid + settings.data.test >= 1:
        problems.append("data.valid and data.test together leave nothing to train on; their sum must be below 1.")
    for name in ("lr_find", "unfreeze_lr_find"):
        sweep = getattr(settings, name)
        if sweep.start >= sweep.end:
            problems.append(f"{name}.start is {sweep.start:g}, but must be below {name}.end, {sweep.end:g}.")
    for name in ("train_augmented", "train_full"):
        if getattr(settings, name).epochs > 10_000:
            problems.append(
                f"{name}: its cycles make {getattr(settings, name).epochs} epochs; at most 10000 are sensible."
            )
    return problems
