"""The step `precompute`, interrupted and resumed."""

import dataclasses
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline import scratch
from pipeline.artifacts import artifact
from pipeline.step import Run
from tasks import precompute as module
from tests.integration.project import SMALL, paint
from unfreeze.data.packing import pack
from unfreeze.data.sources import read_source
from unfreeze.evaluation.predicting import backbone_activations
from unfreeze.persistence.interruption import Interrupted, Interruption
from unfreeze.settings.overrides import apply_overrides
from unfreeze.settings.schema import CheckpointSettings, Settings, load_settings

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a project whose images are packed."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    apply_overrides("params.yaml", [f"{k}={v}" for k, v in (SMALL | {"data.source": "photos"}).items()])
    paint(Path("photos"), 0)
    found = load_settings()
    pack(read_source("photos"), artifact("ingest", ""), found.data, 0)
    return found


def run(settings: Settings) -> dict[str, float]:
    artifact("precompute", "").mkdir(parents=True, exist_ok=True)
    tracker: Any = None
    execution = Run("precompute", tracker, "word", CheckpointSettings(60, None, "none"), Interruption())
    return dict(module.precompute.function(execution, 0, settings.batch_size, settings.backbone))


def written() -> dict[str, bytes]:
    return {name: artifact("precompute", name).read_bytes() for name in ("activations.npy", "baseline.npy")}


def test_what_another_version_of_torch_computed_is_not_used(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(settings)
    shutil.rmtree(artifact("precompute", ""))
    monkeypatch.setattr("torch.__version__", "0.0.1")
    with caplog.at_level(logging.INFO, "unfreeze"):
        run(settings)
    assert "were done before an interruption" not in caplog.text
    assert "on the CPU" in caplog.text


@pytest.mark.parametrize("batches", [1, 2])
def test_what_was_computed_is_not_computed_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, batches: int
) -> None:
    expected = run(settings), written()
    assert np.load(artifact("precompute", "activations.npy")).shape == (48, expected[0]["features"])
    assert expected[0]["batch_size"] == int(SMALL["batch_size"])
    shutil.rmtree(artifact("precompute", ""))
    shutil.rmtree(scratch.ROOT / "precompute")

    def cut_short(*arguments: Any) -> Iterator[NDArray[np.float32]]:
        for number, batch in enumerate(backbone_activations(*arguments)):
            if number == batches:
                raise Interrupted
            yield batch

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(module, "backbone_activations", cut_short)
        run(settings)
    assert not any(artifact("precompute", "").iterdir())
    with caplog.at_level(logging.INFO, "unfreeze"):
        assert (run(settings), written()) == expected
    assert f"{16 * batches} of 48 images were done before an interruption" in caplog.text
    shutil.rmtree(artifact("precompute", ""))  # as DVC does if it had not recorded the outputs yet
    with caplog.at_level(logging.INFO, "unfreeze"):
        assert (run(settings), written()) == expected
    assert "48 of 48 images were done before an interruption" in caplog.text
    artifact("precompute", "metrics.json").touch()  # as the step itself does at its end
    scratch.clear_earlier("lr_find")
    assert not (scratch.ROOT / "precompute").exists()


def test_few_images_are_read_in_small_batches_by_default(settings: Settings) -> None:
    assert run(dataclasses.replace(settings, batch_size="auto"))["batch_size"] == 32


def test_activations_of_other_weights_are_not_gone_on_with(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(settings), written()

    def stop(*_: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(module, "fit_baseline", stop)
        patched.setattr(module, "checksum", lambda tensors: "others")
        run(settings)
    with caplog.at_level(logging.INFO, "unfreeze"):
        assert (run(settings), written()) == expected
    assert "before an interruption" not in caplog.text
