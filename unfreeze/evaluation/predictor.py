"""Predict images from a file of weights alone, for `unfreeze predict` and the served model."""

import io
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import nn

from unfreeze.acceleration.frozen import frozen_copy
from unfreeze.batches.loader import Loader, Normalisation
from unfreeze.data.decoding import BrokenImage, decode, resize_shorter
from unfreeze.data.packed import PackedImages, in_memory
from unfreeze.device import best_device, to_device
from unfreeze.errors import TransientError
from unfreeze.evaluation.predicting import Probabilities, predict, predict_tta
from unfreeze.models.weights import load_classifier
from unfreeze.parallel import in_order

CHUNK = 256
"""Images in memory at once."""
MAX_MEGAPIXELS = 400.0
"""Images whose header states more are rejected, because decoding them would take more than a gigabyte."""
BATCH = 64
"""Images or views per batch."""


class Predictor:
    """A trained classifier for image files."""

    def __init__(self, weights: str | Path) -> None:
        """Load the weights. Raises UserError if they are missing or damaged."""
        model, self._meta = load_classifier(Path(weights))
        self._device = best_device()
        self._model = to_device(model, self._device)
        self.classes: list[str] = self._meta["classes"]
        self._one_at_a_time = threading.Lock()
        self._copies: dict[int, nn.Module] = {}

    def predict(self, images: Sequence[str | Path | io.BytesIO], tta: bool = False) -> pd.DataFrame:
        """Classify images; calls from several threads run one after another.

        Args:
            images: files, or their bytes.
            tta: average over augmented views of each image, as many as the model was evaluated with.

        Returns:
            A row per image: ``predicted``, ``p_<class>``..., and ``reason``, which is empty unless the image could not
            be read. The other values of an image that could not be read are missing.
        """
        with self._one_at_a_time:  # tracing a network changes how every module of the process is called
            rows = [self._chunk(images[i : i + CHUNK], tta) for i in range(0, max(1, len(images)), CHUNK)]
        return pd.concat(rows, ignore_index=True)

    def _chunk(self, images: Sequence[str | Path | io.BytesIO], tta: bool) -> pd.DataFrame:
        read = list(in_order(self._read, images, 2))
        pixels = [found for found in read if not isinstance(found, str)]
        reasons = [found if isinstance(found, str) else "" for found in read]
        good = np.array([reason == "" for reason in reasons])
        probabilities = np.full((len(images), len(self.classes)), np.nan, np.float32)
        if pixels:
            probabilities[good] = self._probabilities(pixels, tta)
        table = pd.DataFrame(probabilities, columns=[f"p_{name}" for name in self.classes])
        best = [self.classes[p.argmax()] if ok else None for p, ok in zip(probabilities, good, strict=True)]
        table.insert(0, "predicted", best)
        return table.assign(reason=reasons)

    def _read(self, image: str | Path | io.BytesIO) -> NDArray[np.uint8] | str:
        """The image's pixels (H, W, 3), resized to the network's size by the shorter side; or why it cannot be read."""
        size = self._meta["image_size"]
        try:
            _, decoded = decode(image, MAX_MEGAPIXELS, size, self._meta["grey_range"])
            return np.asarray(resize_shorter(decoded, size))
        except (BrokenImage, TransientError) as error:
            return str(error)

    def _probabilities(self, pixels: list[np.ndarray], tta: bool) -> Probabilities:
        backbone = self._model.backbone
        loader = Loader(
            packed_in_memory(pixels, self.classes, self._meta["image_size"]),
            Normalisation(backbone.mean, backbone.std),
            self._device,
            BATCH,
        )
        rows = np.arange(len(pixels))
        if not tta:
            return predict(self._model, loader.plain(rows), self._frozen(loader, rows))
        _, averaged = predict_tta(self._model, loader, rows, self._meta["augment"], self._meta["tta_views"]).averaged()
        return averaged

    def _frozen(self, loader: Loader, rows: NDArray[np.int64]) -> nn.Module:
        """The frozen copy for batches of this size; the last one is cached, as requests often repeat a size."""
        count = min(len(rows), loader.wide)
        if count not in self._copies:
            [(images, _)] = loader.plain(rows[:count])
            self._copies = {count: frozen_copy(self._model.eval(), images)}
        return self._copies[count]


def packed_in_memory(pixels: Sequence[np.ndarray], classes: list[str], image_size: int) -> PackedImages:
    """Images (H, W, 3), resized already, as packed images of no known class (they all count as class 0)."""
    sizes = np.array([(image.shape[1], image.shape[0]) for image in pixels])
    ends = np.cumsum(sizes.prod(1) * 3)
    flat = np.concatenate([image.reshape(-1) for image in pixels])
    return PackedImages(
        in_memory(flat),
        pd.DataFrame({"split": [""] * len(pixels)}),
        classes,
        np.zeros(len(pixels), np.int64),
        sizes,
        ends - sizes.prod(1) * 3,
        image_size,
    )
