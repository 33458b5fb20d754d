"""Rendered views compared with computations by hand and by SciPy, for the CPU's code and for the GPU's code."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.devices import NEEDS_A_GPU
from unfreeze.batches import rendering
from unfreeze.batches.rendering import Normalisation, find_pixels, gather_canvas, read_pixels, render, render_here
from unfreeze.batches.views import DIHEDRAL, Views, joined, plain_views, random_views
from unfreeze.data.packed import PackedImages
from unfreeze.evaluation.predictor import packed_in_memory
from unfreeze.settings.schema import Augment

SIZE = 16
RAW = Normalisation((0, 0, 0), (1, 1, 1))
Way = Callable[[PackedImages, Views, Normalisation], torch.Tensor]


def here(packed: PackedImages, views: Views, norm: Normalisation) -> torch.Tensor:
    return render_here(packed, views, norm, torch.float32)


def as_on_a_gpu(packed: PackedImages, views: Views, norm: Normalisation) -> torch.Tensor:
    return rendered(packed, views, norm, torch.device("cpu"))


def on_a_gpu(packed: PackedImages, views: Views, norm: Normalisation) -> torch.Tensor:
    return rendered(packed, views, norm, torch.device("cuda")).cpu()


def lying_there(packed: PackedImages, views: Views, norm: Normalisation) -> torch.Tensor:
    return gathered(packed, views, norm, torch.device("cpu"))


def lying_on_a_gpu(packed: PackedImages, views: Views, norm: Normalisation) -> torch.Tensor:
    return gathered(packed, views, norm, torch.device("cuda")).cpu()


def gathered(packed: PackedImages, views: Views, norm: Normalisation, device: torch.device) -> torch.Tensor:
    """Render as if all packed pixels were already on the device."""
    pixels = np.empty(int(packed.sizes.prod(1).sum()) * 3, np.uint8)
    packed.read(0, pixels)
    found = find_pixels(torch.from_numpy(pixels).view(-1, 3).to(device), packed, views)
    canvas = gather_canvas(found, packed, views, device)
    return render(canvas, views, packed.sizes[views.rows], packed.image_size, norm, device)


def rendered(packed: PackedImages, views: Views, norm: Normalisation, device: torch.device) -> torch.Tensor:
    canvas = gather_canvas(read_pixels(packed, views), packed, views, device)
    return render(canvas, views, packed.sizes[views.rows], packed.image_size, norm, device)


WAYS = pytest.mark.parametrize(
    "way",
    [
        here,
        as_on_a_gpu,
        lying_there,
        pytest.param(on_a_gpu, id="device_cuda", marks=NEEDS_A_GPU),
        pytest.param(lying_on_a_gpu, id="device_cuda, lying there", marks=NEEDS_A_GPU),
    ],
)
ROUNDING: dict[Way, float] = dict.fromkeys([as_on_a_gpu, lying_there, on_a_gpu, lying_on_a_gpu], 0.0) | {
    here: 0.5 / 255
}
"""Largest rounding error of each function. OpenCV, which `here` uses, rounds to multiples of 1/255."""


def images(count: int, width: int = SIZE, height: int = SIZE) -> PackedImages:
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(count)]
    return packed_in_memory(pixels, ["a", "b"], SIZE)


def expected(image: NDArray[np.uint8], views: Views, number: int) -> NDArray[np.float64]:
    """A view without lighting, rendered by SciPy: (S, S, 3), where 1 is white."""
    from scipy.ndimage import map_coordinates

    offset = np.arange(SIZE) - (SIZE - 1) / 2
    x, y = np.einsum("ij,jyx->iyx", views.linear[number], np.stack(np.meshgrid(offset, offset)))
    places = [y + views.centre[number, 1], x + views.centre[number, 0]]
    channels = [map_coordinates(image[..., c] / 255, places, order=1, mode="mirror") for c in range(3)]
    return np.stack(channels, 2)


@WAYS
def test_plain_views_are_the_centre_squares_normalised(way: Way) -> None:
    packed, norm = images(3, width=21), Normalisation((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    batch = way(packed, plain_views(np.arange(3), packed.sizes, SIZE), norm)
    assert batch.shape == (3, 3, SIZE, SIZE) and batch.is_contiguous(memory_format=torch.channels_last)
    for i in range(3):
        square = packed[i][:, 2 : 2 + SIZE] / 255
        np.testing.assert_allclose(batch[i].permute(1, 2, 0), (square - norm.mean) / norm.std, atol=1e-5)


@WAYS
@pytest.mark.parametrize("number", range(8))
def test_a_warp_by_a_symmetry_is_that_symmetry(way: Way, number: int) -> None:
    packed = images(1)
    views = plain_views(np.array([0]), packed.sizes, SIZE)
    views = dataclasses.replace(views, linear=DIHEDRAL[[number]], plain=False)
    batch = way(packed, views, RAW)
    x = packed[0].transpose(2, 0, 1) / 255
    by_hand = [x, x[:, :, ::-1], x[:, ::-1], x[:, ::-1, ::-1]]
    by_hand += [y.transpose(0, 2, 1) for y in by_hand]
    distances = [np.abs(batch[0].numpy() - y).max() for y in by_hand]
    assert min(distances) < 1e-5
    assert (int(np.argmin(distances)) == 0) == (number == 0)


@WAYS
def test_a_turned_view_is_interpolated_and_mirrored_at_the_edges(way: Way) -> None:
    """Rotation by 20 degrees and zoom, for a square that extends beyond the image's edge."""
    packed = images(2, width=SIZE + 6)
    turn = np.deg2rad(20)
    linear = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]], np.float32) * 0.9
    views = plain_views(np.arange(2), packed.sizes, SIZE)
    centre = views.centre + np.array([[2, 0], [-3, 1]], np.float32)
    views = dataclasses.replace(views, linear=np.stack([linear, linear.T]), centre=centre, plain=False)
    reach = np.abs(views.linear).sum(2) * (SIZE - 1) / 2
    assert ((centre - reach < -1) | (centre + reach > packed.sizes)).any()
    batch = way(packed, views, RAW)
    for i in range(2):
        by_scipy = expected(packed[i], views, i)
        np.testing.assert_allclose(batch[i].permute(1, 2, 0), by_scipy, atol=ROUNDING[way] + 1e-4)


@WAYS
def test_random_views_of_long_images_are_where_they_should_be(way: Way) -> None:
    """The views are far from the corner, in an image that is too long for OpenCV to warp as a whole."""
    packed = images(4, width=40_000)
    augment = Augment("dihedral", 10, 1.3, 0.0)
    views = random_views(np.arange(4), packed.sizes, SIZE, augment, np.random.default_rng(3))
    batch = way(packed, views, RAW)
    for i in range(4):
        near = np.floor(views.centre[i, 0]).astype(int) - 100  # SciPy would take seconds for the whole image
        assert 0 < near < 39_000
        part = dataclasses.replace(views, centre=views.centre - np.array([near, 0], np.float32))
        by_scipy = expected(packed[i][:, near : near + 200], part, i)
        np.testing.assert_allclose(batch[i].permute(1, 2, 0), by_scipy, atol=ROUNDING[way] + 2e-2)


@WAYS
def test_lighting_is_contrast_around_grey_and_then_brightness(way: Way) -> None:
    packed = images(2)
    views = plain_views(np.arange(2), packed.sizes, SIZE)
    gain, shift = np.array([0.8, 1.2], np.float32), np.array([0.05, -0.1], np.float32)
    batch = way(packed, dataclasses.replace(views, gain=gain, shift=shift), RAW)
    for i in range(2):
        by_hand = (packed[i] / 255 - 0.5) * gain[i] + 0.5 + shift[i]
        np.testing.assert_allclose(batch[i].permute(1, 2, 0), by_hand, atol=1e-5)


@pytest.mark.parametrize("width", [SIZE, 50])
def test_several_views_of_an_image_are_the_views_one_by_one_and_its_pixels_are_read_once(width: int) -> None:
    packed, augment, rows = images(4, width=width), Augment("both", 10, 1.3, 0.2), np.array([2, 2, 0, 2, 3, 0, 2, 2])
    views = random_views(rows, packed.sizes[rows], SIZE, augment, np.random.default_rng(0))
    assert len(read_pixels(packed, views).values) <= packed.sizes[[0, 2, 3]].prod(1).sum()
    for number, batch in enumerate(as_on_a_gpu(packed, views, RAW)):
        alone = Views(*(part[[number]] for part in (views.rows, views.linear, views.centre, views.gain, views.shift)))
        torch.testing.assert_close(batch[None], as_on_a_gpu(packed, alone, RAW), rtol=0, atol=1e-5)


def test_joined_views_are_the_views_one_after_the_other() -> None:
    packed, augment = images(6), Augment("both", 10, 1.2, 0.2)
    parts = [
        random_views(rows, packed.sizes[rows], SIZE, augment, np.random.default_rng(len(rows)))
        for rows in (np.array([4, 1, 3]), np.array([0]), np.array([5, 2]))
    ]
    together = here(packed, joined(parts), RAW)
    assert torch.equal(together, torch.cat([here(packed, part, RAW) for part in parts]))


def test_what_lies_beyond_an_edge_is_mirrored_beside_larger_images_as_well() -> None:
    rng = np.random.default_rng(0)
    pixels = [rng.integers(100, 256, (SIZE, width, 3), dtype=np.uint8) for width in (SIZE, 2 * SIZE)]
    packed, angle = packed_in_memory(pixels, ["a", "b"], SIZE), np.float32(np.radians(2))
    views = plain_views(np.arange(2), packed.sizes, SIZE)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], np.float32)
    views = dataclasses.replace(views, linear=np.stack([turn, turn]), plain=False)
    batch = as_on_a_gpu(packed, views, RAW)
    np.testing.assert_allclose(batch[0].permute(1, 2, 0), expected(packed[0], views, 0), atol=1e-4)


@pytest.mark.parametrize("plain", [True, False])
def test_pieces_of_a_batch_are_the_batch_and_half_precision_is_rounded_once(
    plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, norm = images(5, width=21), Normalisation((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    augment = Augment("both", 10, 1.2, 0.2)
    rows = np.arange(5)
    views = (
        plain_views(rows, packed.sizes, SIZE)
        if plain
        else random_views(rows, packed.sizes, SIZE, augment, np.random.default_rng(0))
    )
    whole = here(packed, views, norm)
    for images_in_a_piece in (1, 2, 5):
        monkeypatch.setattr(rendering, "PIECE", images_in_a_piece * SIZE * SIZE * 3)
        assert torch.equal(here(packed, views, norm), whole)
        assert torch.equal(render_here(packed, views, norm, torch.bfloat16), whole.bfloat16())
