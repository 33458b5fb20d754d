"""Views: which square of an image the network sees, as one affine map per image.

Flip, quarter turns, rotation, zoom and crop of a view are composed into a single matrix before any pixel is touched,
so that a view is warped once (`unfreeze.batches.rendering`), not once per transform. All random numbers are drawn
with NumPy from a generator that the caller seeds: the same seed gives the same views on every device.

Coordinates are in pixels of the packed image, x to the right, y down, pixel centres at whole numbers. A view's matrix
maps the offset of an output pixel from the centre of the output square to a position in the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unfreeze.settings.schema import Augment

Floats = NDArray[np.float32]

# The eight symmetries of the square, plain first: identity, mirrored, upside down, both,
# then the quarter turns with and without mirror.
DIHEDRAL = np.array(
    [
        [[1, 0], [0, 1]],
        [[-1, 0], [0, 1]],
        [[1, 0], [0, -1]],
        [[-1, 0], [0, -1]],
        [[0, 1], [1, 0]],
        [[0, -1], [1, 0]],
        [[0, 1], [-1, 0]],
        [[0, -1], [-1, 0]],
    ],
    dtype=np.float32,
)
FLIPS = {"none": DIHEDRAL[:1], "horizontal": DIHEDRAL[:2], "both": DIHEDRAL[:4], "dihedral": DIHEDRAL}


@dataclass(frozen=True)
class Views:
    """One view each of a batch of B images.

    Attributes:
        rows: (B,) row numbers of the packed images.
        linear: (B, 2, 2) linear part of the map from output offsets (x, y) to positions in the image.
        centre: (B, 2) where in the image (x, y) the centre of the output square lies.
        gain: (B,) factor on pixel values around mid-grey (contrast).
        shift: (B,) offset added afterwards, as a share of full white (brightness).
        plain: whether all views are unchanged whole-pixel crops, which need no warp.
    """

    rows: NDArray[np.int64]
    linear: Floats
    centre: Floats
    gain: Floats
    shift: Floats
    plain: bool = False

    def __len__(self) -> int:
        return len(self.rows)


def joined(parts: Sequence[Views]) -> Views:
    """Several batches of views, none of them plain, as one."""
    return Views(
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.linear for part in parts]),
        np.concatenate([part.centre for part in parts]),
        np.concatenate([part.gain for part in parts]),
        np.concatenate([part.shift for part in parts]),
    )


def plain_views(rows: NDArray[np.int64], sizes: NDArray[np.int64], image_size: int) -> Views:
    """The centre square of each image, unchanged.

    Args:
        rows: (B,) row numbers.
        sizes: (B, 2) width and height in pixels of each image.
        image_size: side of the square in pixels.
    """
    count = len(rows)
    corner = (sizes - image_size) // 2
    centre = (corner + (image_size - 1) / 2).astype(np.float32)
    ones, zeros = np.ones(count, np.float32), np.zeros(count, np.float32)
    return Views(rows, np.repeat(DIHEDRAL[:1], count, 0), centre, ones, zeros, plain=True)


def random_views(
    rows: NDArray[np.int64], sizes: NDArray[np.int64], image_size: int, augment: Augment, rng: np.random.Generator
) -> Views:
    """A randomly augmented view of each image: flip or symmetry, rotation, zoom, place, lighting.

    Args:
        rows: (B,) row numbers.
        sizes: (B, 2) width and height in pixels of each image.
        image_size: side of the square in pixels.
        augment: strength of each augmentation.
        rng: the random generator.
    """
    count = len(rows)
    flips = FLIPS[augment.flip]
    flip = flips[rng.integers(len(flips), size=count)]
    angle = np.deg2rad(rng.uniform(-augment.rotate, augment.rotate, count))
    scale = 1 / rng.uniform(1, augment.zoom, count)
    rotation = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], 1).reshape(-1, 2, 2)
    linear = (rotation * scale[:, None, None]) @ flip
    # The centre is drawn so that the crop is inside the image before rotation. Pixels beyond the image's edges are
    # mirrored.
    half = (scale * (image_size - 1) / 2)[:, None]
    centre = rng.uniform(half, np.maximum(sizes - 1 - half, half))
    gain = np.exp(rng.uniform(-augment.lighting, augment.lighting, count))
    shift = rng.uniform(-augment.lighting, augment.lighting, count) / 2
    return Views(
        rows,
        linear.astype(np.float32),
        centre.astype(np.float32),
        gain.astype(np.float32),
        shift.astype(np.float32),
    )


def tta_views(size: NDArray[np.int64], image_size: int, augment: Augment, count: int) -> tuple[Floats, Floats]:
    """The augmented views of one image that test-time augmentation averages with the plain one.

    Squares are spread evenly over the longer side. All squares are used in one symmetry, then all in the next, until
    there are at least ``count`` views. After the last symmetry all of them are repeated, each time with more zoom. The
    last repetition has the largest zoom of the training, because a network predicts badly on views unlike those it was
    trained on. Without zoom nothing is repeated, because the views would be duplicates. There is always at least one
    view.

    Args:
        size: (2,) width and height in pixels.
        image_size: side of the square in pixels.
        augment: the symmetries, and the largest zoom of the training.
        count: number of views to aim for.

    Returns:
        linear (V, 2, 2) and centre (V, 2), as in `Views`.
    """
    flips = FLIPS[augment.flip]
    squares = int(np.ceil(size.max() / image_size))
    rounds = int(np.ceil(count / squares))
    if augment.zoom == 1:
        rounds = min(rounds, max(len(flips) - (squares == 1), 1))
    place = np.linspace(0, 1, squares) if squares > 1 else np.array([0.5])
    centre = (image_size - 1) / 2 + np.tile(np.outer(place, size - image_size), (rounds, 1))
    # A single square in its first symmetry is the plain view, which is predicted separately.
    turn = np.repeat(np.arange(rounds), squares) + (squares == 1)
    closer = turn // len(flips)
    scale = augment.zoom ** -(closer / max(closer.max(), 1))
    linear = flips[turn % len(flips)] * scale[:, None, None]
    return linear.astype(np.float32), centre.astype(np.float32)
