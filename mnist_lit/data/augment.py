"""Random changes of training images, drawn per image and applied to a whole batch at once, on the batch's device."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse.typing import ClosedUnitInterval, restricted_number_type
from torch import Generator, Tensor
from torch.nn import functional as F

__all__ = ["Augment", "affine", "crop", "erase", "inverse", "restroke"]

# Declared Any, as mypy takes no other made type for an annotation; without a name jsonargparse makes one of the range.
HalfTurn: Any = restricted_number_type(None, float, [(">=", 0), ("<=", 180)])
Slant: Any = restricted_number_type(None, float, [(">=", 0), ("<=", 45)])
Fraction: Any = restricted_number_type(None, float, [(">=", 0), ("<", 1)])
Padding: Any = restricted_number_type(None, int, [(">=", 0), ("<=", 14)])


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random changes of the training images, each drawn anew for every image; at 0 a change is switched off.

    Args:
        rotation: Largest turn about the centre, 0 to 180 degrees, either way.
        translation: Largest shift along each axis, 0 to 1, as a fraction of the image's side.
        scale: Largest change of size, 0 to below 1: images are scaled by a factor in [1 - scale, 1 + scale].
        shear: Largest slant, 0 to 45 degrees, either way.
        aspect: Largest change of proportions, 0 to below 1: images become wider by a factor in [1 - aspect, 1 + aspect]
            and lower by the same factor.
        stroke: Largest change of the strokes' width, 0 to 1, either way, as a fraction of one pixel on each side.
        crop: Largest shift along each axis by whole pixels, 0 to 14: images are padded by as many and cropped back.
        erasing: Probability, 0 to 1, that a rectangle of an image, up to half as high and wide, is blanked.
    """

    rotation: HalfTurn = 0.0
    translation: ClosedUnitInterval = 0.0
    scale: Fraction = 0.0
    shear: Slant = 0.0
    aspect: Fraction = 0.0
    stroke: ClosedUnitInterval = 0.0
    crop: Padding = 0
    erasing: ClosedUnitInterval = 0.0

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Change a batch of images of shape (n, 1, h, w) in [0, 1], where 0 is paper; shape and range stay.

        Args:
            images: The batch; it is returned itself when every change is switched off.
            generator: Where all random numbers come from; it must be on the device of the images.
        """
        images = affine(
            images,
            rotation=self.rotation,
            translation=self.translation,
            scale=self.scale,
            shear=self.shear,
            aspect=self.aspect,
            generator=generator,
        )
        images = restroke(images, self.stroke, generator)
        images = crop(images, self.crop, generator)
        return erase(images, self.erasing, generator)


def affine(
    images: Tensor,
    *,
    rotation: float = 0.0,
    translation: float = 0.0,
    scale: float = 0.0,
    shear: float = 0.0,
    aspect: float = 0.0,
    generator: Generator,
) -> Tensor:
    """Scale, slant, turn about the centre and shift each image, in one resampling; the strengths are Augment's."""
    if not (rotation or translation or scale or shear or aspect):
        return images
    angle, slant, size, *shift = 2 * _draw(5, images, generator) - 1
    matrix = inverse(angle * math.radians(rotation), (slant * math.radians(shear)).tan(), 1 + size * scale)
    if aspect:
        width_factor = 1 + aspect * (2 * _draw(1, images, generator)[0] - 1)
        matrix = matrix * torch.stack([1 / width_factor, width_factor], dim=1).unsqueeze(2)
    # The grid's unit is half a side of the image: in it, a turn of an image that is not square is no plain rotation.
    height, width = images.shape[-2:]
    matrix = matrix * matrix.new_tensor([[1, height / width], [width / height, 1]])
    offset = matrix @ (torch.stack(shift, dim=1) * (-2 * translation)).unsqueeze(2)
    # One large product: affine_grid's many small ones take longer than all the rest.
    places = torch.cat([matrix, offset], dim=2).flatten(end_dim=1) @ _places(height, width, images.device)
    grid = places.view(-1, 2, height, width).permute(0, 2, 3, 1)
    changed = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    # The weights of an interpolation may add up to a rounding error above 1.
    return changed.clamp_(max=1)


def inverse(angle: Tensor, slant: Tensor, size: Tensor) -> Tensor:
    """The way back from a place in the changed image to its source: un-turn, un-slant, un-scale.

    Args:
        angle: Turns, in radians, of shape (n,).
        slant: Tangents of the angles of slant, of shape (n,).
        size: Factors, of shape (n,).

    Returns:
        Matrices of shape (n, 2, 2) in the unit in which places are given.
    """
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos + slant * sin, sin - slant * cos, -sin, cos], dim=1).view(-1, 2, 2) / size.view(-1, 1, 1)


def restroke(images: Tensor, strength: float, generator: Generator) -> Tensor:
    """Draw each image with a wider or a narrower pen: by up to `strength` pixels on each side of a stroke."""
    if not strength:
        return images
    change = strength * (2 * _draw(1, images, generator).view(-1, 1, 1, 1) - 1)
    wider = F.max_pool2d(images, kernel_size=3, stride=1, padding=1)
    narrower = -F.max_pool2d(-images, kernel_size=3, stride=1, padding=1)
    return images.lerp(torch.where(change > 0, wider, narrower), change.abs())


def crop(images: Tensor, padding: int, generator: Generator) -> Tensor:
    """Shift each image by up to `padding` whole pixels along each axis; paper fills the gap."""
    if not padding:
        return images
    num_images, _, height, width = images.shape
    windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
    top, left = torch.randint(2 * padding + 1, (2, num_images), generator=generator, device=images.device)
    return windows[torch.arange(num_images, device=images.device), :, top, left]


def erase(images: Tensor, probability: float, generator: Generator) -> Tensor:
    """Blank, with this probability, a rectangle in each image: 1 pixel to half the side of the image in each axis."""
    if not probability:
        return images
    chance, *draws = _draw(5, images, generator)
    height, width = images.shape[-2:]
    rows, columns = _stretch(height, *draws[:2]), _stretch(width, *draws[2:])
    blank = rows[:, :, None] & columns[:, None, :] & (chance < probability)[:, None, None]
    return images.masked_fill(blank.unsqueeze(1), 0)


def _draw(num: int, images: Tensor, generator: Generator) -> Tensor:
    """Numbers in [0, 1), `num` for each image, of shape (num, n)."""
    return torch.rand((num, len(images)), generator=generator, dtype=images.dtype, device=images.device)


@functools.lru_cache(maxsize=4)
def _places(height: int, width: int, device: torch.device) -> Tensor:
    """Where the pixels' centres lie between -1 and 1, as x, y and 1; shape (3, height * width)."""
    down, right = ((2 * torch.arange(side, device=device) + 1) / side - 1 for side in (height, width))
    y, x = torch.meshgrid(down, right, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)]).flatten(start_dim=1)


def _stretch(side: int, length: Tensor, start: Tensor) -> Tensor:
    """Which pixels of a side lie in a stretch of it, for `length` and `start` in [0, 1); shape (n, side)."""
    length = (length * (side // 2)).floor() + 1
    start = (start * (side - length + 1)).floor()
    place = torch.arange(side, device=start.device)
    return (start[:, None] <= place) & (place < (start + length)[:, None])
