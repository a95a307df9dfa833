"""Random augmentation, drawn per image and applied to a whole batch at once, on the batch's device."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse.typing import ClosedUnitInterval, restricted_number_type
from torch import Generator, Tensor
from torch.nn import functional as F

# Any, because mypy accepts no type that is made at run time.
RotationAngle: Any = restricted_number_type(None, float, [(">=", 0), ("<=", 180)])
ShearAngle: Any = restricted_number_type(None, float, [(">=", 0), ("<=", 45)])
Fraction: Any = restricted_number_type(None, float, [(">=", 0), ("<", 1)])
Padding: Any = restricted_number_type(None, int, [(">=", 0), ("<=", 14)])


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Change training images at random, each anew for every image; at 0 a change is switched off.

    Args:
        rotation: Largest rotation about the centre, 0 to 180 degrees, in both directions.
        translation: Largest shift along each axis, 0 to 1, as a fraction of the image's side.
        scale: Largest change of size, 0 to below 1: images are scaled by a factor in [1 - scale, 1 + scale].
        shear: Largest shear angle, 0 to 45 degrees, in both directions.
        aspect: Largest change of proportions, 0 to below 1: images become wider by a factor in [1 - aspect, 1 + aspect]
            and lower by the same factor.
        stroke: Largest dilation or erosion of strokes, 0 to 1, as a fraction of one pixel on each side.
        crop: Largest shift along each axis by whole pixels, 0 to 14: images are padded by as many and cropped back.
        erasing: Probability, 0 to 1, that a rectangle of an image, up to half as high and wide, is erased.
    """

    rotation: RotationAngle = 0.0
    translation: ClosedUnitInterval = 0.0
    scale: Fraction = 0.0
    shear: ShearAngle = 0.0
    aspect: Fraction = 0.0
    stroke: ClosedUnitInterval = 0.0
    crop: Padding = 0
    erasing: ClosedUnitInterval = 0.0

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Augment images of shape (n, c, h, w) in [0, 1], on a background of 0.

        Args:
            images: The batch, which is returned itself if every change is switched off.
            generator: Source of all random numbers, on the device of the images.
        """
        if self.rotation or self.translation or self.scale or self.shear or self.aspect:
            images = self._affine(images, generator)
        if self.stroke:
            images = self._stroke_width(images, generator)
        if self.crop:
            images = self._random_crop(images, generator)
        if self.erasing:
            images = self._random_erasing(images, generator)
        return images

    def _affine(self, images: Tensor, generator: Generator) -> Tensor:
        angle, slant, size, *shift = 2 * _draw(5, images, generator) - 1
        shear = (slant * math.radians(self.shear)).tan()
        matrix = inverse_affine(angle * math.radians(self.rotation), shear, 1 + size * self.scale)
        if self.aspect:
            width_factor = 1 + self.aspect * (2 * _draw(1, images, generator)[0] - 1)
            matrix = matrix * torch.stack([1 / width_factor, width_factor], dim=1).unsqueeze(2)
        height, width = images.shape[-2:]
        if height != width:  # the grid is in half sides: a rotation would stretch the image
            matrix = matrix * matrix.new_tensor([[1, height / width], [width / height, 1]])
        offset = matrix @ (torch.stack(shift, dim=1) * (-2 * self.translation)).unsqueeze(2)
        # One large product, as the many small ones of affine_grid take longer than all the rest.
        grid = torch.cat([matrix, offset], dim=2).flatten(end_dim=1) @ _pixel_centers(height, width, images.device)
        grid = grid.view(-1, 2, height, width).permute(0, 2, 3, 1)
        changed = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return changed.clamp_(max=1)  # interpolation weights can add up to slightly more than 1

    def _stroke_width(self, images: Tensor, generator: Generator) -> Tensor:
        change = self.stroke * (2 * _draw(1, images, generator).view(-1, 1, 1, 1) - 1)
        dilated = F.max_pool2d(images, kernel_size=3, stride=1, padding=1)
        eroded = -F.max_pool2d(-images, kernel_size=3, stride=1, padding=1)
        return images.lerp(torch.where(change > 0, dilated, eroded), change.abs())

    def _random_crop(self, images: Tensor, generator: Generator) -> Tensor:
        num_images, _, height, width = images.shape
        windows = F.pad(images, [self.crop] * 4).unfold(2, height, 1).unfold(3, width, 1)
        top, left = torch.randint(2 * self.crop + 1, (2, num_images), generator=generator, device=images.device)
        return windows[torch.arange(num_images, device=images.device), :, top, left]

    def _random_erasing(self, images: Tensor, generator: Generator) -> Tensor:
        chance, *draws = _draw(5, images, generator)
        height, width = images.shape[-2:]
        rows, columns = _interval(height, *draws[:2]), _interval(width, *draws[2:])
        erased = rows[:, :, None] & columns[:, None, :] & (chance < self.erasing)[:, None, None]
        return images.masked_fill(erased.unsqueeze(1), 0)


def inverse_affine(angle: Tensor, slant: Tensor, size: Tensor) -> Tensor:
    """Build the matrices (n, 2, 2) that map pixels of transformed images to their source.

    `angle` is in radians and `slant` the tangent of the shear angle; all are of shape (n,).
    """
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos + slant * sin, sin - slant * cos, -sin, cos], dim=1).view(-1, 2, 2) / size.view(-1, 1, 1)


def _draw(num: int, images: Tensor, generator: Generator) -> Tensor:
    """Draw `num` numbers in [0, 1) for each image, of shape (num, n)."""
    return torch.rand((num, len(images)), generator=generator, dtype=images.dtype, device=images.device)


@functools.lru_cache(maxsize=4)
def _pixel_centers(height: int, width: int, device: torch.device) -> Tensor:
    """Compute x, y and 1 of each pixel's centre, between -1 and 1, of shape (3, height * width)."""
    down, right = ((2 * torch.arange(side, device=device) + 1) / side - 1 for side in (height, width))
    y, x = torch.meshgrid(down, right, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)]).flatten(start_dim=1)


def _interval(side: int, length: Tensor, start: Tensor) -> Tensor:
    """Mask an interval of up to half of a side, given by draws in [0, 1); shape (n, side)."""
    length = (length * (side // 2)).floor() + 1
    start = (start * (side - length + 1)).floor()
    pixel = torch.arange(side, device=start.device)
    return (start[:, None] <= pixel) & (pixel < (start + length)[:, None])
