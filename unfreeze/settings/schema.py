"""The settings of the recipe: a typed, validated model of `params.yaml`.

One dataclass per section, one field per key, annotated with its allowed values. All wrong keys are reported at once,
before anything expensive starts.
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from unfreeze.errors import UserError
from unfreeze.settings.validation import In, OneOf, Rising, Without, check_section, hints, key_names
from unfreeze.settings.yaml_loader import read_yaml

S = TypeVar("S")

Count = Annotated[int, In(1, 10_000)]
Rate = Annotated[float, In(0, 1000, open_low=True)]
Rule = Annotated[str, OneOf(("minimum", "midpoint", "divergence", "steepest", "valley"))]
ScheduleName = Annotated[str, OneOf(("sgdr", "one_cycle", "step", "constant"))]


@dataclass(frozen=True)
class Data:
    """Where the images are, and how they are split and packed."""

    source: str
    image_size: Annotated[int, In(32, 1024)]
    valid: Annotated[float, In(0, 1, open_low=True, open_high=True)]
    test: Annotated[float, In(0, 1, open_high=True)]
    near_duplicates: Annotated[str, OneOf(("group", "report"))]
    max_broken: Annotated[float, In(0, 1)]
    max_megapixels: Annotated[float, In(0, 100_000, open_low=True)]
    grey_range: Annotated[str, OneOf(("auto",))] | Annotated[tuple[float, float], Rising()]
    exclude: str | None
    min_images: Annotated[int, In(1, 1_000_000)]


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
    """Augmentation of the training images."""

    flip: Annotated[str, OneOf(("none", "horizontal", "both", "dihedral"))]
    rotate: Annotated[float, In(0, 180)]
    zoom: Annotated[float, In(1, 4)]
    lighting: Annotated[float, In(0, 1)]


@dataclass(frozen=True)
class Train:
    """Settings that all trainings share."""

    optimizer: Annotated[str, OneOf(("adamw", "sgd"))]
    weight_decay: Annotated[float, In(0, 1)]
    label_smoothing: Annotated[float, In(0, 1, open_high=True)]
    balance: Annotated[str, OneOf(("none", "loss", "sampler"))]


@dataclass(frozen=True)
class LRFind:
    """LR range test: the sweep's ends and length, and the rule that picks a rate, or a rate to use instead."""

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
    """Whole network; with `until_overfitting` the number of cycles is a maximum. `warmup` is a share of each cycle."""

    warmup: Annotated[float, In(0, 1, open_high=True)]
    until_overfitting: bool


@dataclass(frozen=True)
class Evaluate:
    """Evaluation of the trained models."""

    tta_views: Annotated[int, In(1, 64)]


@dataclass(frozen=True)
class Register:
    """Name of the registered model; MLflow puts it into URLs."""

    model_name: Annotated[str, Without("/:")]


@dataclass(frozen=True)
class CheckpointSettings:
    """Checkpoint interval, and where checkpoints are shared with other machines. Changing them makes no step stale."""

    seconds: Annotated[float, In(0, 86_400)]
    batches: Annotated[int, In(1, 1_000_000)] | None
    share: str | None


@dataclass(frozen=True)
class Settings:
    """Everything in `params.yaml`."""

    seed: Annotated[int, In(0, 2**31 - 1)]
    batch_size: Annotated[str, OneOf(("auto",))] | Annotated[int, In(2, 65_536)]
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
    device: Annotated[str, OneOf(("auto", "cuda", "cpu"))]
    checkpoint: CheckpointSettings


KNOWN = tuple(key_names(Settings))
"""Every key: as ``section.key``, or its name alone if it is in no section."""


def load_settings(path: str | Path = "params.yaml") -> Settings:
    """Read and check a file of settings.

    Raises:
        UserError: the file is missing, is not YAML, or has errors; the message names every wrong key.
    """
    return parse_text(read_text(path), str(path))


def read_text(path: str | Path) -> str:
    """The text of a file of settings. Raises UserError if it cannot be read."""
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
        raise UserError(f"{where} is empty; it must have the sections {', '.join(hints(Settings))}.")
    return parse_settings(content, where)


def parse_settings(content: object, where: str = "params.yaml") -> Settings:
    """Validate settings read from YAML, and convert them to their types.

    Args:
        content: a mapping of sections.
        where: the file's name, for the messages.

    Raises:
        UserError: lists every key that is missing, unknown or has a wrong value.
    """
    problems: list[str] = []
    settings = check_section(Settings, content, "", KNOWN, problems)
    if settings is not None:
        problems += _across(settings)
    if settings is None or problems:
        raise UserError(f"{where}: " + (problems[0] if len(problems) == 1 else "\n  - ".join(["", *problems])))
    return settings


def parse_section(kind: type[S], content: object, name: str, where: str) -> S:
    """Validate one section of settings that is not from `params.yaml`.

    Args:
        kind: the section's type, such as `Augment`.
        content: a mapping of keys to values.
        name: the section's name, for the message.
        where: the section's origin, such as a file, for the message.

    Raises:
        UserError: lists, in one line, every key that is missing, unknown or has a wrong value.
    """
    problems: list[str] = []
    section = check_section(kind, content, f"{name}.", KNOWN, problems)
    if section is None:
        raise UserError(f"{where}: {' '.join(problems)}")
    return section


def flatten(settings: object, prefix: str = "") -> dict[str, Any]:
    """Settings as ``section.key -> value``."""
    items = settings.items() if isinstance(settings, Mapping) else vars(settings).items()
    flat: dict[str, Any] = {}
    for key, value in items:
        nested = dataclasses.is_dataclass(value) or isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _across(settings: Settings) -> list[str]:
    """Errors in combinations of keys."""
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
