"""Predictions by a file of weights, as a server asks for them."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

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


def test_requests_at_once_get_what_each_would_get_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = create_backbone("timm:test_efficientnet", "none", 32)
    model = Classifier(backbone, Head(backbone.num_features, 3, 0.0))
    save_classifier(model, tmp_path / "model.safetensors", ["a", "b", "c"], 32, Augment("none", 0, 1.1, 0.0))
    predictor = Predictor(tmp_path / "model.safetensors")
    requests = [[image(seed), image(seed + 100)] for seed in range(12)]
    alone = [predictor.predict(files, 2) for files in requests]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda files: predictor.predict(files, 2), requests))
    for one, other in zip(alone, together, strict=True):
        pd.testing.assert_frame_equal(one, other)
