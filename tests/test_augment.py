"""Augmentation: what each change does to an image, how far it goes, and that it depends on the generator alone."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from mnist_lit.data.augment import Augment

HEIGHT, WIDTH = 28, 40  # not square, so that mixed up axes show
DOWN = (torch.arange(HEIGHT) - (HEIGHT - 1) / 2)[:, None]  # of each pixel from the centre
RIGHT = (torch.arange(WIDTH) - (WIDTH - 1) / 2)[None, :]

STRENGTHS = {
    "rotation": 180, "translation": 0.3, "scale": 0.5, "shear": 45, "aspect": 0.3, "stroke": 1, "crop": 4,
    "erasing": 0.5,
}  # fmt: skip
EACH = [
    {"rotation": 30}, {"translation": 0.2}, {"scale": 0.3}, {"shear": 20}, {"aspect": 0.3}, {"stroke": 1}, {"crop": 3},
    {"erasing": 1}, STRENGTHS,
]  # fmt: skip
each_change = pytest.mark.parametrize("augment", [Augment(**each) for each in EACH], ids=str)  # type: ignore[arg-type]


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def discs(num: int, down: float = 0, right: float = 0, radius: float = 3) -> Tensor:
    """The same disc with soft edges `num` times, so many pixels off the centre of the image."""
    return (radius + 0.5 - torch.hypot(DOWN - down, RIGHT - right)).clamp(0, 1).repeat(num, 1, 1, 1)


def boxes(num: int) -> Tensor:
    """The same square of 10x10 pixels in the centre."""
    images = torch.zeros(num, 1, HEIGHT, WIDTH)
    images[:, :, 9:19, 15:25] = 1
    return images


def ink(images: Tensor) -> Tensor:
    return images.sum(dim=(1, 2, 3))


def centers(images: Tensor) -> tuple[Tensor, Tensor]:
    """Where the centre of mass of each image is, down and to the right of the centre."""
    return ink(images * DOWN) / ink(images), ink(images * RIGHT) / ink(images)


def sides(images: Tensor) -> tuple[Tensor, Tensor]:
    """Height and width of the ink in each image."""
    inked = images > 0.5
    return inked.any(dim=3).sum(dim=(1, 2)), inked.any(dim=2).sum(dim=(1, 2))


def assert_range(values: Tensor, low: float, high: float, tolerance: float) -> None:
    found = [values.min().item(), values.max().item()]
    assert found == [pytest.approx(low, abs=tolerance), pytest.approx(high, abs=tolerance)]


# Every change


@each_change
@pytest.mark.parametrize("shape", [(64, 1, HEIGHT, WIDTH), (64, 3, HEIGHT, WIDTH), (500, 1, 7, 7)], ids=str)
def test_shape_type_and_range_stay(augment: Augment, shape: Sequence[int]) -> None:
    changed = augment(torch.rand(shape, generator=seeded()).round(), seeded())
    assert (changed.shape, changed.dtype) == (shape, torch.float32)
    assert changed.min() >= 0
    assert changed.max() <= 1


@each_change
def test_changes_depend_on_the_generator_alone_and_differ_by_image(augment: Augment) -> None:
    images = discs(32, right=5, radius=8)
    before, state = images.clone(), torch.get_rng_state()
    first, second, other = (augment(images, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(before, images)
    assert torch.equal(state, torch.get_rng_state())
    assert len(first.unique(dim=0)) > 10  # type: ignore[no-untyped-call]


def test_results_are_the_recorded_ones() -> None:
    """Runs of earlier versions are repeated to the last bit."""
    images = discs(4, down=3, right=-2, radius=6)
    changed = Augment(**STRENGTHS)(images, seeded())
    assert ink(changed).tolist() == pytest.approx([63.628616, 146.191284, 121.866959, 52.283257], rel=1e-4)


# Affine


def test_translation_is_at_most_its_fraction_of_the_side_and_neither_scaled_nor_rotated() -> None:
    for others in ({}, {"rotation": 180.0, "scale": 0.4}):
        down, right = centers(Augment(translation=0.2, **others)(discs(500), seeded()))
        assert_range(down, -0.2 * HEIGHT, 0.2 * HEIGHT, 0.3)
        assert_range(right, -0.2 * WIDTH, 0.2 * WIDTH, 0.4)


def test_rotation_is_about_the_centre_by_at_most_its_angle() -> None:
    down, right = centers(Augment(rotation=90)(discs(500, right=9), seeded()))
    assert (torch.hypot(down, right) - 9).abs().max() < 0.1
    assert_range(torch.atan2(down, right).rad2deg(), -90, 90, 2)


def test_scale_grows_and_shrinks_by_at_most_its_share() -> None:
    for side in sides(Augment(scale=0.5)(boxes(500), seeded())):
        assert_range(side, 5, 15, 1)


def test_shear_slants_by_at_most_its_angle() -> None:
    down, right = centers(Augment(shear=30)(discs(500, down=-8), seeded()))
    assert (down + 8).abs().max() < 0.1
    assert_range(right, -8 * math.tan(math.radians(30)), 8 * math.tan(math.radians(30)), 0.25)


def test_aspect_makes_wider_and_lower_or_narrower_and_higher() -> None:
    heights, widths = sides(Augment(aspect=0.4)(boxes(500), seeded()))
    assert_range(widths, 6, 14, 1)
    assert (heights * widths / 100 - 1).abs().max() < 0.35  # whole pixels
    assert (heights[widths > 12] < 9).all()


# Strokes, crops, erasing


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_strokes_become_wider_or_narrower_by_at_most_their_pixels(strength: float) -> None:
    line = torch.zeros(500, 1, HEIGHT, WIDTH)
    line[:, :, 10:15] = 1
    widths = Augment(stroke=strength)(line, seeded())[:, 0, :, WIDTH // 2].sum(dim=1)
    assert_range(widths, 5 - 2 * strength, 5 + 2 * strength, 0.02)
    assert widths.mean().item() == pytest.approx(5, abs=0.15)


def test_crop_gives_each_shift_by_whole_pixels() -> None:
    image = torch.rand(1, 1, HEIGHT, WIDTH, generator=seeded())
    padded = F.pad(image, [2] * 4)
    shifts = [padded[..., y : y + HEIGHT, x : x + WIDTH] for y in range(5) for x in range(5)]
    changed = Augment(crop=2)(image.repeat(500, 1, 1, 1), seeded())
    assert torch.equal(torch.cat(shifts).unique(dim=0), changed.unique(dim=0))  # type: ignore[no-untyped-call]


def test_erasing_removes_one_rectangle_of_up_to_half_the_sides() -> None:
    erased = Augment(erasing=1)(torch.ones(500, 1, HEIGHT, WIDTH), seeded())[:, 0] == 0
    rows, columns = erased.any(dim=2), erased.any(dim=1)
    assert torch.equal(rows[:, :, None] & columns[:, None, :], erased)
    for interval, side in ((rows, HEIGHT), (columns, WIDTH)):
        assert (interval.diff(dim=1, prepend=torch.zeros(500, 1, dtype=torch.bool)).sum(dim=1) <= 2).all()
        assert interval.sum(dim=1).unique().tolist() == [*range(1, side // 2 + 1)]  # type: ignore[no-untyped-call]
        assert interval.any(dim=0).all()
