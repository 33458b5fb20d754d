"""Weights on disk: safetensors with the metadata to build the network again. Reading them cannot execute code."""

import contextlib
import dataclasses
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unfreeze.errors import UserError
from unfreeze.models.backbones import NOT_FINITE, Backbone, create_backbone, not_finite
from unfreeze.models.classifier import Classifier, Head
from unfreeze.persistence.atomic import write_whole
from unfreeze.settings.schema import Augment, Evaluate, parse_section

Meta = dict[str, Any]


def save_backbone(backbone: Backbone, path: Path) -> None:
    """Write a backbone: its weights, and the name to build it again."""
    _save(backbone, path, {"kind": "backbone", **_backbone_meta(backbone)})


def load_backbone(path: Path) -> Backbone:
    """Read a backbone. Raises UserError if the file is damaged or not a backbone."""
    tensors, meta = _load(path, "backbone")
    with _described(path):
        backbone = create_backbone(meta["name"], "none", meta["image_size"])
    return _filled(backbone, tensors, path)


def save_head(head: Head, path: Path) -> None:
    """Write a head."""
    _save(head, path, {"kind": "head", **_head_meta(head)})


def load_head(path: Path) -> Head:
    """Read a head. Raises UserError if the file is damaged or not a head."""
    tensors, meta = _load(path, "head")
    with _described(path):
        head = Head(meta["features"], meta["classes"], meta["dropout"])
    return _filled(head, tensors, path)


def save_classifier(
    model: Classifier,
    path: Path,
    classes: list[str],
    image_size: int,
    augment: Augment,
    grey_range: tuple[float, float] | None = None,
    tta_views: int = 8,
) -> None:
    """Write a classifier: a file that is enough to predict with.

    Args:
        model: the classifier.
        path: output file; replaced atomically.
        classes: names of the classes in order of the logits.
        image_size: side in pixels of the squares it was trained on.
        augment: augmentation it was trained with, for the views of test-time augmentation.
        grey_range: values of black and white in the training images, if they have greys of more than 8 bits.
        tta_views: number of views that test-time augmentation averages, as in the model's evaluation.
    """
    meta = {
        "kind": "classifier",
        "classes": classes,
        "image_size": image_size,
        "augment": dataclasses.asdict(augment),
        "grey_range": grey_range,
        "tta_views": tta_views,
        "backbone": _backbone_meta(model.backbone),
        "head": _head_meta(model.head),
    }
    _save(model, path, meta)


def load_classifier(path: Path) -> tuple[Classifier, Meta]:
    """Read a classifier.

    Returns:
        The model, and what was saved with it: classes, image_size, augment, grey_range, tta_views.

    Raises:
        UserError: the file is missing, damaged, of an earlier version, or not a classifier.
    """
    tensors, meta = _load(path, "classifier")
    with _described(path):
        backbone = create_backbone(meta["backbone"]["name"], "none", meta["backbone"]["image_size"])
        head = meta["head"]
        model = Classifier(backbone, Head(head["features"], head["classes"], head["dropout"]))
        if missing := {"classes", "image_size", "augment", "grey_range", "tta_views"} - meta.keys():
            said = ", ".join(sorted(missing))
            raise UserError(f"{path} lacks {said}: an earlier version of unfreeze wrote it. Run the recipe again.")
        meta["augment"] = parse_section(Augment, meta["augment"], "augment", str(path))
        evaluate = parse_section(Evaluate, {"tta_views": meta["tta_views"]}, "evaluate", str(path))
        meta["tta_views"] = evaluate.tta_views
        if meta["grey_range"] is not None:
            black, white = (float(value) for value in meta["grey_range"])
            meta["grey_range"] = black, white
    return _filled(model, tensors, path), meta


def _backbone_meta(backbone: Backbone) -> Meta:
    return {"name": backbone.name, "image_size": backbone.image_size}


def _head_meta(head: Head) -> Meta:
    return {"features": head.features, "classes": head.classes, "dropout": head.dropout}


def _save(module: nn.Module, path: Path, meta: Mapping[str, Any]) -> None:
    from safetensors.torch import save

    # Copies: a tensor that several modules share has several names, which safetensors refuses.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    # Not by safetensors' `save_file`, whose errors name neither the file nor a full disk.
    write_whole(path, save(tensors, {"unfreeze": json.dumps(meta)}))


def _load(path: Path, kind: str) -> tuple[dict[str, torch.Tensor], Meta]:
    from safetensors import safe_open

    if not os.path.isfile(path):  # also False for a name that is too long
        raise UserError(f"There are no weights at {path}: run the recipe first (unfreeze run).")
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {})["unfreeze"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise UserError(f"{path} is damaged, or was not written by unfreeze: {error}") from None
    if not isinstance(meta, dict) or "kind" not in meta:
        raise UserError(f"{path} is damaged, or was not written by unfreeze: it does not say what it holds.")
    if name := not_finite(tensors):
        raise UserError(f"The tensor {name} of {path} {NOT_FINITE}, or run the recipe again with lower rates.")
    if meta["kind"] != kind:
        raise UserError(f"{path} holds a {meta['kind']}, not a {kind}.")
    return tensors, meta


@contextlib.contextmanager
def _described(path: Path) -> Iterator[None]:
    """Raise a UserError that names the file if the description of a network in it is incomplete or invalid."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} does not describe a network: {type(error).__name__}: {error}") from None


def _filled(module: Any, tensors: dict[str, torch.Tensor], path: Path) -> Any:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        what = " ".join(str(error).splitlines()[:2]).replace("\t", "")
        raise UserError(
            f"{path} does not fit the network that it names: {what} If an earlier version of unfreeze wrote it, run the "
            "recipe again."
        ) from None
    return module


def checksum(tensors: dict[str, torch.Tensor], text: str = "") -> str:
    """CRC-32, as hex, of tensors with their names, and of a text."""
    found = zlib.crc32(text.encode())
    for name in sorted(tensors):
        found = zlib.crc32(name.encode(), found)
        found = zlib.crc32(tensors[name].cpu().flatten().view(torch.uint8).numpy().data, found)
    return f"{found:08x}"
