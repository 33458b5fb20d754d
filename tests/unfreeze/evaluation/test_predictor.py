"""Predictions from a file of weights, as a server requests them."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from unfreeze.acceleration.frozen import frozen_copy
from unfreeze.evaluation import predictor as module
from unfreeze.evaluation.predicting import predict_tta
from unfreeze.evaluation.predictor import Predictor
from unfreeze.models.backbones import create_backbone
from unfreeze.models.classifier import Classifier, Head
from unfreeze.models.weights import save_classifier
from unfreeze.settings.schema import Augment


def image(seed: int) -> io.BytesIO:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file


@pytest.fixture
def predictor(tmp_path: Path) -> Predictor:
    torch.manual_seed(0)
    backbone = create_backbone("timm:test_efficientnet", "none", 32)
    model = Classifier(backbone, Head(backbone.num_features, 3, 0.0))
    save_classifier(model, tmp_path / "model.safetensors", ["a", "b", "c"], 32, Augment("none", 0, 1.1, 0.0))
    return Predictor(tmp_path / "model.safetensors")


def test_the_network_is_folded_once_for_requests_of_one_size(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    folded: list[int] = []

    def counted(network: nn.Module, images: torch.Tensor) -> nn.Module:
        folded.append(len(images))
        return frozen_copy(network, images)

    monkeypatch.setattr(module, "frozen_copy", counted)
    sizes = (2, 2, 1, 1, 1)
    found = [predictor.predict([image(seed) for seed in range(size)]) for size in sizes]
    assert folded == [2, 1]
    pd.testing.assert_frame_equal(found[0], found[1])
    np.testing.assert_allclose(found[2].filter(like="p_"), found[0].filter(like="p_")[:1], atol=0.02)


def test_greys_of_more_than_8_bits_are_shown_as_in_training(predictor: Predictor, tmp_path: Path) -> None:
    shown = np.random.default_rng(0).integers(0, 256, (40, 32), dtype=np.uint8)
    eight, twelve = tmp_path / "eight.png", tmp_path / "twelve.png"
    Image.fromarray(shown).save(eight)
    Image.fromarray(shown * np.uint16(4) + np.uint16(1000)).save(twelve)
    trained = Predictor(tmp_path / "model.safetensors")._model
    save_classifier(
        trained, tmp_path / "greys.safetensors", ["a", "b", "c"], 32, Augment("none", 0, 1.1, 0.0), (1000, 2020)
    )
    found = Predictor(tmp_path / "greys.safetensors").predict([eight, twelve])
    np.testing.assert_array_equal(found.filter(like="p_").iloc[0], found.filter(like="p_").iloc[1])
    without = predictor.predict([eight, twelve])
    assert without["reason"][0] == "" and "no range of them is known (data.grey_range)" in without["reason"][1]


def test_tta_takes_as_many_views_as_the_model_was_evaluated_with(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    augment, taken = Augment("none", 0, 1.1, 0.0), []
    save_classifier(predictor._model, tmp_path / "three.safetensors", ["a", "b", "c"], 32, augment, None, 3)

    def counted(*arguments: Any) -> Any:
        taken.append(arguments[-1])
        return predict_tta(*arguments)

    monkeypatch.setattr(module, "predict_tta", counted)
    found = Predictor(tmp_path / "three.safetensors").predict([image(0)], tta=True)
    assert taken == [3] and found.filter(like="p_").sum(axis=1)[0] == pytest.approx(1)


def test_requests_at_once_get_what_each_would_get_alone(predictor: Predictor) -> None:
    requests = [[image(seed), image(seed + 100)] for seed in range(12)]
    alone = [predictor.predict(files, tta=True) for files in requests]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda files: predictor.predict(files, tta=True), requests))
    for one, other in zip(alone, together, strict=True):
        pd.testing.assert_frame_equal(one, other)
