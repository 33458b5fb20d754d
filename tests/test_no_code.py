"""Files that the project loads cannot run code: dangerous files are refused with a message, and not executed."""

import ast
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.inputs import precomputed
from tests import corpus
from unfreeze.data.decoding import BrokenImage, decode
from unfreeze.data.packed import open_packed
from unfreeze.errors import UserError
from unfreeze.evaluation.predictor import Predictor
from unfreeze.models.backbones import create_backbone
from unfreeze.models.weights import load_backbone, load_classifier, load_head
from unfreeze.settings.schema import load_settings

ROOT = Path(__file__).parent.parent
NETWORK = "timm:test_efficientnet"
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol", r"ignore:::PIL\.")


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """Path that a payload would create. The test fails if the path exists afterwards."""
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists()


def plant(folder: Path, mark: Path) -> list[Path]:
    """Create files that run code if they are loaded carelessly."""
    bad = Payload(mark)
    array = np.empty(1, dtype=object)
    array[0] = bad
    (folder / "plain.pkl").write_bytes(pickle.dumps(bad))
    (folder / "old.pth").write_bytes(pickle.dumps({"state_dict": bad}, protocol=2))
    torch.save({"state_dict": bad}, folder / "zipped.pth")
    torch.save({"state_dict": {"a": torch.zeros(1)}, "extra": bad}, folder / "among others.pt")
    torch.save({"state_dict": bad}, folder / "old torch.pt", _use_new_zipfile_serialization=False)
    np.save(folder / "array.npy", array, allow_pickle=True)
    (folder / "named otherwise.safetensors").write_bytes(pickle.dumps(bad))
    return sorted(folder.iterdir())


def test_the_payloads_are_dangerous(tmp_path: Path) -> None:
    for number, file in enumerate(("plain.pkl", "zipped.pth", "array.npy")):
        (folder := tmp_path / str(number)).mkdir()
        plant(folder, tmp_path / f"mark {number}")
        careless = {
            "plain.pkl": lambda path: pickle.loads(path.read_bytes()),
            "zipped.pth": lambda path: torch.load(path, weights_only=False),
            "array.npy": lambda path: np.load(path, allow_pickle=True),
        }[file]
        before = os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)
        careless(folder / file)
        if before:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
        assert (tmp_path / f"mark {number}").is_dir()


def test_as_weights_of_a_backbone(tmp_path: Path, mark: Path) -> None:
    (folder := tmp_path / "files").mkdir()
    for file in plant(folder, mark):
        with pytest.raises(UserError, match=r"backbone\.weights: .* cannot be read as weights"):
            create_backbone(NETWORK, str(file), 32)


@pytest.mark.parametrize("load", [load_backbone, load_head, load_classifier, Predictor])
def test_as_weights_that_a_step_wrote(tmp_path: Path, mark: Path, load: type) -> None:
    (folder := tmp_path / "files").mkdir()
    for file in plant(folder, mark):
        with pytest.raises(UserError, match="is damaged, or was not written by unfreeze"):
            load(file)


@pytest.mark.parametrize(
    "meta",
    [
        None, "text", "[]", "[1]", "null", "{}", '{"kind": []}', '{"kind": "classifier"}', '{"kind": "backbone"}', '{"kind": "head"}',
        '{"kind": "classifier", "backbone": 1}', '{"kind": "classifier", "backbone": {"name": 3, "image_size": 32}}',
        '{"kind": "classifier", "backbone": {"name": "os:system", "image_size": 32}}',
        '{"kind": "classifier", "backbone": {"name": "timm:test_efficientnet", "image_size": "x"}, "head": {}}',
        '{"kind": "classifier", "backbone": {"name": "timm:test_efficientnet", "image_size": 32}, "head": {"features": "x"}}',
        '{"kind": "classifier", "backbone": {"name": "timm:test_efficientnet", "image_size": 32}, '
        '"head": {"features": 256, "classes": -2, "dropout": 0.5}}',
        '{"kind": "classifier", "backbone": {"name": "timm:test_efficientnet", "image_size": 32}, '
        '"head": {"features": 256, "classes": 2, "dropout": 0.5}}',
        '{"kind": "classifier", "backbone": {"name": "timm:test_efficientnet", "image_size": 32}, "classes": ["a", "b"], '
        '"head": {"features": 256, "classes": 2, "dropout": 0.5}, "image_size": 32, '
        '"augment": {"flip": "none", "rotate": 0, "zoom": 1, "lighting": 0}, "grey_range": [1]}',
    ],
)  # fmt: skip
def test_weights_with_a_strange_description_are_refused(tmp_path: Path, meta: str | None) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {} if meta is None else {"unfreeze": meta})
    for load in (load_classifier, load_head, load_backbone):
        with pytest.raises(UserError) as caught:
            load(tmp_path / "a.safetensors")
        assert "\n" not in str(caught.value)


def test_as_weights_that_torchvision_has_fetched(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import ResNet18_Weights

    (cache := tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(Payload(mark), cache / ResNet18_Weights.DEFAULT.url.rsplit("/", 1)[-1])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"resnet18-\S+, downloaded by torchvision, cannot be read .* Delete it"):
        create_backbone("torchvision:resnet18", "pretrained", 32)


@pytest.mark.parametrize(
    "value",
    ["!!python/object/apply:os.mkdir [MARK]", "!!python/object/new:os.mkdir [MARK]", "!!python/name:os.mkdir",
     "!!python/module:antigravity"],
)  # fmt: skip
def test_in_settings(tmp_path: Path, mark: Path, value: str) -> None:
    (tmp_path / "params.yaml").write_text(f"seed: {value.replace('MARK', str(mark))}\n")
    with pytest.raises(UserError, match=r"params\.yaml, line 1 is not valid YAML"):
        load_settings(tmp_path / "params.yaml")


def test_as_images(tmp_path: Path, mark: Path) -> None:
    (folder := tmp_path / "files").mkdir()
    (folder / "program.eps").write_bytes(corpus.bad()["program.jpg"][0])
    for file in plant(folder, mark):
        with pytest.raises(BrokenImage):
            decode(file, 100)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dataset.json", b"{"), ("dataset.json", b"\xff"), ("dataset.json", b"[]"), ("dataset.json", b'{"classes": []}'),
        ("images.csv", b""), ("images.csv", b"\xff\xfe"), ("images.csv", b'a,b\n"'), ("images.csv", b"a,b\n1,2\n"),
        ("pixels.bin", b""), ("pixels.bin", b"123"),
    ],
)  # fmt: skip
def test_damaged_packed_images_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    about = {"classes": ["a"], "image_size": 32, "source": "", "fingerprint": ""}
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    row = "a.png,a,train,,1,1,1,1,0,00,00,"
    columns = "path,label,split,group,width,height,packed_width,packed_height,offset,digest,difference_hash,reason"
    (tmp_path / "images.csv").write_text(f"{columns}\n{row}\n")
    (tmp_path / "pixels.bin").write_bytes(b"123")
    assert len(open_packed(tmp_path)) == 1
    if name == "pixels.bin" and content:
        content += b"4"
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="run the step ingest again"):
        open_packed(tmp_path)


def test_a_step_does_not_execute_what_an_artifact_holds(tmp_path: Path, mark: Path) -> None:
    array = np.empty((2, 2), dtype=object)
    array[:] = Payload(mark)
    np.save(tmp_path / "activations.npy", array, allow_pickle=True)
    for how in ({}, {"mmap_mode": "r"}):
        with pytest.raises(ValueError):
            np.load(tmp_path / "activations.npy", **how)  # as every step does: see the test below


CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "yaml.load_all", "joblib.load", "pd.read_pickle", "pandas.read_pickle", "torch.jit.load", "marshal.loads", "shelve.open",
}  # fmt: skip
"""Calls that run their input as code, or may do so."""


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def dangerous(text: str) -> list[str]:
    """Calls in a module that could run untrusted code."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [
                name for name in names if name.split(".")[0] in ("pickle", "dill", "cloudpickle", "marshal", "shelve")
            ]
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        words = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        if name in CALLS or (name.endswith("torch.load") and words.get("weights_only") is not True):
            found.append(name)
        if words.get("shell") or words.get("allow_pickle") or words.get("weights_only", True) is not True:
            found.append(name)
    return found


@pytest.mark.parametrize("package", ["unfreeze", "tasks", "flows"])
def test_no_call_in_our_packages_could(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        text = file.read_text(encoding="utf-8")
        # The exception is ruamel's round-trip loader, which creates no Python objects. No package has `import pickle`.
        found = [name for name in dangerous(text) if not (file.name == "overrides.py" and name == "yaml.load")]
        assert not found, f"{file}: {found}"


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from pickle import loads", "eval(x)", "torch.load(f)", "torch.load(f, weights_only=False)",
     "np.load(f, allow_pickle=True)", "yaml.load(t, L)", "subprocess.run(c, shell=True)", "os.system(c)"],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert dangerous(line)


def test_activations_that_run_code_or_are_cut_off_are_refused(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "artifacts" / "precompute"
    folder.mkdir(parents=True)
    plant(folder, mark)
    np.save(folder / "whole.npy", np.zeros((3, 4), np.float32))
    (folder / "cut off.npy").write_bytes((folder / "whole.npy").read_bytes()[:-8])
    (folder / "empty.npy").touch()
    for name in ("array.npy", "plain.pkl", "cut off.npy", "empty.npy"):
        with pytest.raises(UserError, match=f"{name} is damaged"):
            precomputed(name)
    with pytest.raises(UserError, match="run the step precompute"):
        precomputed("none.npy")
    assert precomputed("whole.npy").shape == (3, 4)
