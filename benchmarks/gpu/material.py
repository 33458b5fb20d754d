"""Test data of the GPU benchmark: networks with random weights and synthetic packed images."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from unfreeze.batches.loader import Loader, Normalisation
from unfreeze.data.packed import PackedImages, open_packed
from unfreeze.device import best_device, to_device
from unfreeze.evaluation.predictor import packed_in_memory
from unfreeze.models.backbones import create_backbone
from unfreeze.models.classifier import Classifier, Head
from unfreeze.settings.schema import Settings, load_settings

ROOT = Path(__file__).parent.parent.parent
DIFFERENT = 400
"""Number of different images, a multiple of the number of classes. Generating more would take longer than training."""
CLASSES = ["ant", "bee", "cow", "dog"]
Row = dict[str, Any]
"""A row of the table: ``what``, ``value``, and if it has a bar (target), ``bar`` (text) and ``held``."""


@dataclass(frozen=True)
class Speed:
    """A network whose speed is measured.

    Attributes:
        network: name of the backbone.
        size: side of its images in pixels.
        batch: images per batch.
        images: number of packed images.
        epoch: number of images in a measured epoch.
        bars: minimum share of the ceiling for each part of the recipe.
    """

    network: str
    size: int
    batch: int
    images: int
    epoch: int
    bars: dict[str, float]


@dataclass(frozen=True)
class Scale:
    """Size of the benchmark: full size on a GPU, toy size on a CPU.

    Attributes:
        networks: networks whose frozen copies are checked.
        strict: networks whose trainings are repeated in new processes.
        size, batch: image size and batch size of the checks.
        steps: training steps of a repeated training.
        kills: batches at which work is killed and then resumed in another process.
        long: training steps during which memory must not grow.
        speeds: networks and batches whose speed is measured.
        batches: batch sizes of the ceilings.
        recipe: network of the whole recipe.
        seconds: duration of a rate measurement.
    """

    networks: tuple[str, ...]
    strict: tuple[str, ...]
    size: int
    batch: int
    steps: int
    kills: tuple[int, ...]
    long: int
    speeds: tuple[Speed, ...]
    batches: tuple[int, ...]
    recipe: Speed
    seconds: float


_LITE = Speed(
    "timm:tf_efficientnet_lite0", 160, 64, 20_000, 64 * 64, {"whole network": 0.8, "frozen": 0.8, "precompute": 0.8}
)
_NETWORKS = (
    "torchvision:resnet50", "timm:tf_efficientnet_lite0", "timm:convnext_tiny", "timm:vit_small_patch16_224",
    "timm:swin_tiny_patch4_window7_224",
)  # fmt: skip
FULL = Scale(
    networks=_NETWORKS,
    strict=(*_NETWORKS, "torchvision:vgg11"),
    size=224,
    batch=16,
    steps=20,
    kills=(1, 7, 10),
    long=300,
    speeds=(
        Speed(
            "torchvision:resnet50", 224, 256, 6_000, 12 * 256, {"whole network": 0.95, "frozen": 0.9, "precompute": 0.9}
        ),
        _LITE,
    ),
    batches=(32, 64, 256),
    recipe=_LITE,
    seconds=0.5,
)
_TINY = Speed("timm:test_efficientnet", 32, 8, 80, 40, {"whole network": 0.8, "frozen": 0.8, "precompute": 0.8})
TOY = Scale(
    networks=("timm:test_efficientnet", "timm:test_vit"),
    strict=("timm:test_efficientnet",),
    size=32,
    batch=8,
    steps=4,
    kills=(7,),
    long=24,
    speeds=(_TINY,),
    batches=(8,),
    recipe=_TINY,
    seconds=0.02,
)


def settings() -> Settings:
    """The default settings of the project."""
    return load_settings(ROOT / "params.yaml")


def row(what: str, value: Any, at_least: float | None = None, at_most: float | None = None) -> Row:
    """A row of the table, with a bar (target) if one is given. A value of False or NaN misses its bar."""
    if isinstance(value, bool):
        return {"what": what, "value": value, "bar": "true", "held": value}
    if at_least is not None:
        return {"what": what, "value": value, "bar": f">= {at_least:g}", "held": bool(value >= at_least)}
    if at_most is not None:
        return {"what": what, "value": value, "bar": f"<= {at_most:g}", "held": bool(value <= at_most)}
    return {"what": what, "value": value}


def synthetic(count: int, size: int, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    """Smooth images (H, W, 3) in four shapes, with a shorter side of ``size`` and a pattern per class; and labels."""
    rng = np.random.default_rng(seed)
    patterns = rng.uniform(60, 200, (len(CLASSES), 6, 6, 3))
    labels = np.arange(count) % len(CLASSES)
    different = min(count, DIFFERENT)
    widths = size + rng.integers(0, 4, different) * (size // 9)
    images = []
    for label, width in zip(labels[:different], widths, strict=True):
        small = np.clip(patterns[label] + rng.normal(0, 45, (6, 6, 3)), 0, 255).astype(np.uint8)
        images.append(cv2.resize(small, (int(width), size)))
    return [images[i % different] for i in range(count)], labels


def packed(count: int, size: int) -> PackedImages:
    """Synthetic packed images in memory: three quarters for training, the rest for validation."""
    images, labels = synthetic(count, size)
    found = packed_in_memory(images, CLASSES, size)
    split = np.where(np.arange(count) < count * 3 // 4, "train", "valid")
    table = pd.DataFrame({"split": split, "path": [f"{i}.png" for i in range(count)]})
    return replace(found, labels=labels.astype(np.int64), table=table)


def packed_folder(base: Path, count: int, size: int) -> PackedImages:
    """Synthetic images on disk, packed as by `unfreeze.data.packing.pack`, made once; valid and test: a tenth each."""
    folder = base / f"packed-{size}"
    if not (folder / "dataset.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        images, labels = synthetic(count, size)
        with (folder / "pixels.bin").open("wb") as file:
            for image in images:
                file.write(image.tobytes())
        widths = np.array([image.shape[1] for image in images])
        table = pd.DataFrame({"path": [f"{i}.png" for i in range(count)], "label": [CLASSES[i] for i in labels]})
        table["split"] = np.select([np.arange(count) % 10 == 8, np.arange(count) % 10 == 9], ["valid", "test"], "train")
        table["width"] = table["packed_width"] = widths
        table["height"] = table["packed_height"] = size
        table["offset"] = np.concatenate([[0], np.cumsum(widths * size * 3)[:-1]])
        table["reason"] = ""
        table.to_csv(folder / "images.csv", index=False)
        (folder / "dataset.json").write_text(json.dumps({"classes": CLASSES, "image_size": size}))
    return open_packed(folder)


def classifier(name: str, size: int, images: PackedImages, batch: int) -> tuple[Classifier, Loader]:
    """A network with random weights on the device, and a loader for it.

    The network's BatchNorm layers have the statistics of some of the images. With the initial statistics, activations
    of a deep network with random weights would vanish.
    """
    device = best_device()
    torch.manual_seed(0)
    network = create_backbone(name, "none", size)
    loader = Loader(images, Normalisation(network.mean, network.std), device, batch)
    model = to_device(Classifier(network, Head(network.num_features, len(CLASSES), 0.5)), device)
    for module in model.backbone.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = None  # statistics are the mean over all batches
    model.train()
    with torch.no_grad():
        for inputs, _ in loader.plain(np.arange(min(len(images), 64))):
            model.backbone(inputs.float())
    for module in model.backbone.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 0.1
    return model.eval(), loader


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """A hash of the bits of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def wait() -> None:
    """Wait until the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
