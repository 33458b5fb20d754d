"""The card, and correctness checks: rendered views, frozen copies, and a process forked after the imports."""

import dataclasses
import importlib
import os
import pkgutil
import platform
import subprocess
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import unfreeze
from benchmarks.gpu.material import CLASSES, Row, Scale, classifier, packed, row, wait
from unfreeze.acceleration.frozen import frozen_copy
from unfreeze.batches.rendering import Normalisation, gather_canvas, read_pixels, render
from unfreeze.batches.views import DIHEDRAL, Views, plain_views, random_views
from unfreeze.data.packed import PackedImages
from unfreeze.device import autocast, best_device, seed_everything
from unfreeze.evaluation.predictor import packed_in_memory
from unfreeze.settings.schema import Augment

RAW = Normalisation((0, 0, 0), (1, 1, 1))


def card(scale: Scale, data: Path) -> list[Row]:
    """Card, driver and libraries; measured speed of its memory and of matrix products."""
    import timm
    import torchvision

    rows = [
        row("processor cores", os.cpu_count()),
        row("python, torch", f"{platform.python_version()}, {torch.__version__}"),
        row("torchvision, timm, numpy", f"{torchvision.__version__}, {timm.__version__}, {np.__version__}"),
    ]
    if not torch.cuda.is_available():
        return [row("card", "none"), *rows]
    about = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    half = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    large = torch.randn(1 << 29, device="cuda")
    copy = torch.empty_like(large)
    product = _seconds(lambda: half @ half)
    copied = _seconds(lambda: copy.copy_(large))
    return [
        row("card", about.name),
        row("memory, GB", round(about.total_memory / 1e9, 1)),
        row("driver, CUDA, cuDNN", f"{driver}, {torch.version.cuda}, {torch.backends.cudnn.version()}"),
        row("bfloat16 matrix product, TFLOP/s", round(2 * 8192**3 / product / 1e12)),
        row("copy on the card, GB/s read and written", round(2 * 4 * large.numel() / copied / 1e9)),
        *rows,
    ]


def _seconds(run: object) -> float:
    times = []
    for _ in range(8):
        wait()
        start = time.perf_counter()
        run()  # type: ignore[operator]
        wait()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def rendering(scale: Scale, data: Path) -> list[Row]:
    """Compare `render` on the device with `render` on the CPU, and with SciPy in double precision."""
    size, count = scale.size, 8
    rng = np.random.default_rng(0)
    augment = Augment("dihedral", 30.0, 1.5, 0.2)
    same = packed_in_memory([rng.integers(0, 256, (size, size, 3), np.uint8) for _ in range(count)], CLASSES, size)
    shapes = [(size, size + 9 * i) if i % 2 else (size + 7 * i, size) for i in range(count)]
    mixed = packed_in_memory([rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes], CLASSES, size)
    square = plain_views(np.arange(count), same.sizes, size)
    cases = {
        "plain": (mixed, plain_views(np.arange(count), mixed.sizes, size)),
        "eight symmetries": (same, dataclasses.replace(square, linear=DIHEDRAL, plain=False)),
        "rotation": (same, _random(same, dataclasses.replace(augment, zoom=1.0, lighting=0.0))),
        "zoom": (same, _random(same, dataclasses.replace(augment, rotate=0.0))),
        "mixed sizes": (mixed, _random(mixed, augment)),
    }
    rows = []
    for name, (images, views) in cases.items():
        pixels, sizes = read_pixels(images, views), images.sizes[views.rows]
        found, here = (
            render(gather_canvas(pixels, images, views, device), views, sizes, size, RAW, device).cpu().double().numpy()
            for device in (best_device(), torch.device("cpu"))
        )
        expected = np.stack([_reference(images, views, i) for i in range(count)])
        rows.append(row(f"{name}: largest difference from the CPU", float(np.abs(found - here).max()), at_most=1e-4))
        rows.append(row(f"{name}: from double precision", float(np.abs(found - expected).max()), at_most=1e-4))
    return rows


def _random(images: PackedImages, augment: Augment) -> Views:
    return random_views(np.arange(len(images)), images.sizes, images.image_size, augment, np.random.default_rng(1))


def _reference(images: PackedImages, views: Views, number: int) -> np.ndarray:
    """A view (3, S, S), computed by SciPy in double precision; the image is mirrored at its edges."""
    from scipy.ndimage import map_coordinates

    offset = np.arange(images.image_size) - (images.image_size - 1) / 2
    linear, centre = views.linear[number].astype(float), views.centre[number].astype(float)
    x, y = np.einsum("ij,jyx->iyx", linear, np.stack(np.meshgrid(offset, offset)))
    image = images[int(views.rows[number])] / 255
    channels = [
        map_coordinates(image[..., c], [y + centre[1], x + centre[0]], order=1, mode="mirror") for c in range(3)
    ]
    gain, shift = float(views.gain[number]), float(views.shift[number])
    return (np.stack(channels) - 0.5) * gain + 0.5 + shift


def frozen(scale: Scale, data: Path) -> list[Row]:
    """Compare frozen copies with their networks: in full precision, and in the precision that the device uses."""
    seed_everything(0)
    images, rows = packed(64, scale.size), []
    for name in scale.networks:
        model, loader = classifier(name, scale.size, images, scale.batch)
        [(batch, _)] = loader.plain(np.arange(min(loader.wide, len(images))))
        network = model.backbone
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            expected = network(batch.float())
            with mock.patch("unfreeze.acceleration.frozen.precision", lambda device: torch.float32):
                whole = frozen_copy(network, batch)
            difference = _relative(whole(batch.float()), expected)
        with torch.no_grad(), autocast(batch.device):
            own = _relative(network(batch).float(), expected)
            half = _relative(frozen_copy(network, batch)(batch).float(), expected)
        rows.append(row(f"{name}: full precision, relative difference", difference, at_most=1e-3))
        rows.append(
            row(f"{name}: mixed precision; the network's own {own:.1e}", half, at_most=max(2 * own, own + 1e-3))
        )
    return rows


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def fork(scale: Scale, data: Path) -> list[Row]:
    """Check that importing the library does not use the GPU, and that a process forked afterwards can use it."""
    for module in pkgutil.walk_packages(unfreeze.__path__, "unfreeze."):
        importlib.import_module(module.name)
    untouched = not torch.cuda.is_initialized()
    child = os.fork()
    if child == 0:
        try:
            device = best_device()
            total = float(torch.ones(1000, device=device).sum())
            os._exit(0 if total == 1000 and (device.type == "cpu" or torch.cuda.is_initialized()) else 1)
        except BaseException as error:
            print(error, flush=True)
            os._exit(2)
    _, status = os.waitpid(child, 0)
    return [row("imports leave the GPU alone", untouched), row("a forked process uses it", status == 0)]
