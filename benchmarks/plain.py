"""Plain fine-tuning script, as an engineer would write it in an afternoon without this project.

All layers of a pretrained network with a new linear layer are trained: AdamW, one cycle up to 1e-3, fixed BatchNorm
statistics. torchvision crops and mirrors the images, and torch's DataLoader loads them.
"""

import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.work import Work, backbone, batch_size, files
from unfreeze.device import autocast, best_device
from unfreeze.evaluation.metrics import measure

RATE = 1e-3


class Photographs(Dataset):
    """Transformed images of a table's rows, and their class numbers."""

    def __init__(self, table, classes, transform):  # type: ignore[no-untyped-def]
        self.table, self.transform = table, transform
        self.labels = [classes.index(label) for label in table["label"]]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.open(self.table["file"].iloc[i]).convert("RGB")), self.labels[i]


def recipe(work: Work, seed: int) -> dict[str, float]:
    """Seconds from images to evaluated model; scores on valid and test, plain and averaged with the mirror image."""
    start, device, size = time.perf_counter(), best_device(), work.image_size
    network, table = backbone(work), files(work)
    classes, mirrored = sorted(table["label"].unique()), work.settings.augment.flip != "none"
    torch.manual_seed(seed)
    model = nn.Sequential(network, nn.Linear(network.num_features, len(classes)))
    model.to(device).to(memory_format=torch.channels_last)
    to_tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(network.mean, network.std)]
    changed = [v2.Resize(size * 8 // 7), v2.RandomCrop(size)] + [v2.RandomHorizontalFlip()] * mirrored
    plain, count = [v2.Resize(size), v2.CenterCrop(size)], batch_size(work)

    def batches(split: str, transform: list[v2.Transform], **kwargs: Any) -> DataLoader:
        chosen = Photographs(table[table["split"] == split], classes, v2.Compose([*transform, *to_tensor]))
        return DataLoader(chosen, count, num_workers=work.workers, **kwargs)

    training, epochs = batches("train", changed, shuffle=True, drop_last=True), work.full_epochs
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=work.settings.train.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * len(training))
    for _ in range(epochs):
        model.train()
        for module in network.modules():
            module.training = module.training and not isinstance(module, nn.BatchNorm2d)
        for images, labels in training:
            with autocast(device):
                logits = model(images.to(device, memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    scores: dict[str, float] = {}
    model.eval()
    for split in ("valid", "test"):
        found, mirror, labels = [], [], []
        for images, some in batches(split, plain):
            with torch.no_grad(), autocast(device):
                found.append(model(images.to(device)).float().softmax(1).cpu().numpy())
                mirror.append(
                    model(images.flip(3).to(device)).float().softmax(1).cpu().numpy() if mirrored else found[-1]
                )
            labels.append(some.numpy())
        alone, true = np.concatenate(found), np.concatenate(labels)
        for prefix, probabilities in (("", alone), ("tta_", (alone + np.concatenate(mirror)) / 2)):
            measured = measure(true, probabilities)
            scores |= {f"{split}_{prefix}{name}": value for name, value in measured.items()}
    return {"seconds": time.perf_counter() - start, **scores}
