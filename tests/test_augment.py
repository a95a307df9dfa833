import math
from argparse import ArgumentError

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Generator, Tensor
from torch.nn import functional as F

from mnist_lit.data.augment import Augment, affine, crop, erase, restroke

HEIGHT, WIDTH = 28, 40  # not square, so that mixed up axes show

ALL_ON = Augment(rotation=180, translation=0.3, scale=0.5, shear=45, aspect=0.3, stroke=1, crop=4, erasing=0.5)
EACH = [
    pytest.param(Augment(rotation=30), id="rotation"),
    pytest.param(Augment(translation=0.2), id="translation"),
    pytest.param(Augment(scale=0.3), id="scale"),
    pytest.param(Augment(shear=20), id="shear"),
    pytest.param(Augment(aspect=0.3), id="aspect"),
    pytest.param(Augment(stroke=1), id="stroke"),
    pytest.param(Augment(crop=3), id="crop"),
    pytest.param(Augment(erasing=1), id="erasing"),
    pytest.param(ALL_ON, id="all"),
]


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def places() -> tuple[Tensor, Tensor]:
    """Distances of each pixel from the centre: down, of shape (h, 1), and to the right, of shape (1, w)."""
    down = torch.arange(HEIGHT) - (HEIGHT - 1) / 2
    right = torch.arange(WIDTH) - (WIDTH - 1) / 2
    return down[:, None], right[None, :]


def discs(num: int, down: float = 0, right: float = 0, radius: float = 3) -> Tensor:
    """The same soft-edged disc `num` times, its centre off the image's by so many pixels."""
    distance = torch.hypot(places()[0] - down, places()[1] - right)
    return (radius + 0.5 - distance).clamp(0, 1).repeat(num, 1, 1, 1)


def ink(images: Tensor) -> Tensor:
    return images.sum(dim=(1, 2, 3))


def centres(images: Tensor) -> tuple[Tensor, Tensor]:
    """Where the ink of each image has its centre, down and to the right of the image's."""
    down, right = places()
    return ink(images * down) / ink(images), ink(images * right) / ink(images)


# Every change


@pytest.mark.parametrize("augment", EACH)
@pytest.mark.parametrize("images", [torch.rand(64, 1, HEIGHT, WIDTH, generator=seeded()), torch.ones(500, 1, 7, 7)])
def test_shape_type_and_range_stay(augment, images):
    changed = augment(images, seeded())

    assert images.shape == changed.shape
    assert torch.float32 == changed.dtype
    assert changed.min() >= 0
    assert changed.max() <= 1


@pytest.mark.parametrize("augment", [each for each in EACH if each.id != "stroke"])  # that moves nothing
def test_paper_fills_the_gaps(augment):
    changed = augment(torch.ones(8, 1, HEIGHT, WIDTH), seeded())

    assert changed.min() == 0


def test_without_strength_the_same_images_return_and_nothing_is_drawn():
    images, generator = discs(4), seeded()

    assert images is Augment()(images, generator)
    assert torch.equal(seeded().get_state(), generator.get_state())


@pytest.mark.parametrize("augment", EACH)
def test_result_depends_on_the_generator_alone(augment):
    images = discs(8, right=5, radius=8)
    before, state = images.clone(), torch.get_rng_state()

    first, second, other = (augment(images, seeded(seed)) for seed in (1, 1, 2))

    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(before, images)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("augment", EACH)
def test_images_of_a_batch_are_changed_differently(augment):
    changed = augment(discs(32, right=5, radius=8), seeded())

    assert len(changed.unique(dim=0)) > 10


# Affine


def test_translation_shifts_by_at_most_its_fraction_of_the_side():
    down, right = centres(affine(discs(500), translation=0.25, generator=seeded()))

    for shift, side in ((down, HEIGHT), (right, WIDTH)):
        assert shift.max().item() == pytest.approx(0.25 * side, rel=0.05)
        assert shift.min().item() == pytest.approx(-0.25 * side, rel=0.05)


def test_translation_is_not_scaled_or_turned_with_the_image():
    changed = affine(discs(500), translation=0.2, rotation=180, scale=0.4, generator=seeded())

    down, right = centres(changed)
    assert down.abs().max().item() == pytest.approx(0.2 * HEIGHT, rel=0.05)
    assert right.abs().max().item() == pytest.approx(0.2 * WIDTH, rel=0.05)


def test_rotation_turns_about_the_centre_by_at_most_its_angle():
    down, right = centres(affine(discs(500, right=9), rotation=90, generator=seeded()))

    angles = torch.atan2(down, right).rad2deg()
    assert (torch.hypot(down, right) - 9).abs().max() < 0.1
    assert angles.max().item() == pytest.approx(90, abs=2)
    assert angles.min().item() == pytest.approx(-90, abs=2)


def test_rotation_keeps_a_disc_round_and_in_place():
    disc = discs(500, radius=9)

    changed = affine(disc, rotation=180, generator=seeded())

    assert (changed - disc).abs().max() < 0.3
    assert torch.stack(centres(changed)).abs().max() < 0.05


def test_scale_grows_and_shrinks_by_at_most_its_share():
    box = torch.zeros(500, 1, HEIGHT, WIDTH)
    box[:, :, 9:19, 15:25] = 1

    inked = affine(box, scale=0.5, generator=seeded()) > 0.5

    for sides in (inked.any(dim=3).sum(dim=(1, 2)), inked.any(dim=2).sum(dim=(1, 2))):
        assert sides.min().item() == pytest.approx(5, abs=1)
        assert sides.max().item() == pytest.approx(15, abs=1)


def test_shear_slants_by_at_most_its_angle():
    down, right = centres(affine(discs(500, down=-8), shear=30, generator=seeded()))

    farthest = 8 * math.tan(math.radians(30))
    assert (down + 8).abs().max() < 0.1
    assert right.max().item() == pytest.approx(farthest, rel=0.05)
    assert right.min().item() == pytest.approx(-farthest, rel=0.05)


def test_aspect_makes_wider_and_lower_or_narrower_and_higher():
    box = torch.zeros(500, 1, HEIGHT, WIDTH)
    box[:, :, 9:19, 15:25] = 1

    inked = affine(box, aspect=0.4, generator=seeded()) > 0.5

    heights, widths = inked.any(dim=3).sum(dim=(1, 2)), inked.any(dim=2).sum(dim=(1, 2))
    assert widths.min().item() == pytest.approx(6, abs=1)
    assert widths.max().item() == pytest.approx(14, abs=1)
    assert (heights * widths / 100 - 1).abs().max() < 0.35  # whole pixels
    assert (heights[widths > 12] < 9).all()


def test_neither_turn_nor_slant_nor_proportions_change_the_area():
    disc = discs(500, radius=7)

    changed = affine(disc, rotation=180, shear=45, aspect=0.2, generator=seeded())

    assert (ink(changed) / ink(disc) - 1).abs().max() < 0.02


def test_mild_changes_keep_most_of_the_ink():
    zeros = discs(200, radius=10) - discs(200, radius=7)

    changed = affine(zeros, rotation=10, translation=0.1, scale=0.1, shear=10, generator=seeded())

    kept = ink(changed) / ink(zeros)
    assert kept.mean().item() == pytest.approx(1, abs=0.03)
    assert kept.min() > 0.9**2 - 0.05
    assert kept.max() < 1.1**2 + 0.05


# Stroke


def test_stroke_becomes_wider_or_narrower_by_at_most_its_pixels():
    line = torch.zeros(500, 1, HEIGHT, WIDTH)
    line[:, :, 10:15] = 1

    for strength in (0.5, 1):
        widths = restroke(line, strength, seeded())[:, 0, :, WIDTH // 2].sum(dim=1)

        assert widths.min().item() == pytest.approx(5 - 2 * strength, abs=0.02)
        assert widths.max().item() == pytest.approx(5 + 2 * strength, abs=0.02)
        assert widths.mean().item() == pytest.approx(5, abs=0.15)


# Crop


def test_crop_gives_each_shift_by_whole_pixels():
    image = torch.rand(1, 1, HEIGHT, WIDTH, generator=seeded())
    padded = F.pad(image, [2] * 4)
    shifts = [padded[..., y : y + HEIGHT, x : x + WIDTH] for y in range(5) for x in range(5)]

    changed = crop(image.repeat(500, 1, 1, 1), 2, seeded())

    assert torch.equal(torch.cat(shifts).unique(dim=0), changed.unique(dim=0))


# Erase


def test_erasing_blanks_one_rectangle_of_up_to_half_the_sides():
    erased = erase(torch.ones(500, 1, HEIGHT, WIDTH), 1, seeded())[:, 0] == 0

    rows, columns = erased.any(dim=2), erased.any(dim=1)
    assert torch.equal(rows[:, :, None] & columns[:, None, :], erased)
    for stretch, side in ((rows, HEIGHT), (columns, WIDTH)):
        assert (stretch.diff(dim=1, prepend=torch.zeros(500, 1, dtype=torch.bool)).sum(dim=1) <= 2).all()
        assert stretch.sum(dim=1).unique().tolist() == [*range(1, side // 2 + 1)]
        assert stretch.any(dim=0).all()


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_erasing_happens_with_its_probability(probability):
    erased = erase(torch.ones(4000, 1, 8, 8), probability, seeded()) == 0

    assert erased.any(dim=(1, 2, 3)).float().mean().item() == pytest.approx(probability, abs=0.03)


# Configuration


class Owner:
    def __init__(self, augment: Augment = Augment()) -> None:
        self.augment = augment


@pytest.fixture
def parser():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Owner, "data")
    return parser


def test_everything_is_off_unless_configured(parser):
    assert parser.instantiate(parser.parse_args([])).data.augment == Augment()


def test_strengths_from_a_config_work_like_those_from_python(parser):
    strengths = {
        "rotation": 180,
        "translation": 0.3,
        "scale": 0.5,
        "shear": 45,
        "aspect": 0.3,
        "stroke": 1,
        "crop": 4,
        "erasing": 0.5,
    }

    augment = parser.instantiate(parser.parse_object({"data": {"augment": strengths}})).data.augment

    assert augment == ALL_ON
    assert torch.equal(ALL_ON(discs(8), seeded()), augment(discs(8), seeded()))


@pytest.mark.parametrize(
    "strength",
    [
        "rotation=181",
        "translation=1.1",
        "scale=1",
        "shear=46",
        "aspect=1",
        "stroke=1.1",
        "crop=15",
        "crop=0.5",
        "erasing=1.1",
    ],
)
def test_strengths_out_of_range_are_refused_by_name(parser, strength):
    name, value = strength.split("=")

    with pytest.raises(ArgumentError, match=rf'"data.augment.{name}"(?s:.*){value}'):
        parser.parse_args([f"--data.augment.{strength}"])


def test_help_tells_range_and_unit(parser):
    assert "0 to 180 degrees" in " ".join(parser.format_help().split())
