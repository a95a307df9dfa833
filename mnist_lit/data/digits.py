"""Extract the digit of any picture in the form of MNIST's images.

MNIST was made like that (LeCun, Cortes and Burges, "The MNIST database of handwritten digits"): ink as grey levels in a
box of 20x20 pixels that keeps its proportions, placed in 28x28 by its centre of mass.

What is ink and what is background cannot be known from a picture alone. So every reasonable answer becomes a candidate:
dark and bright strokes, strokes of another colour, the inside of every sheet, screen and frame, each of several
components. The network's confidence in them decides.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy import ndimage
from skimage.morphology import convex_hull_image, skeletonize

from mnist_lit.data.segmentation import (
    Box,
    Gray,
    Mask,
    crop,
    estimate_ink,
    fill_holes,
    find_enclosed,
    is_rectangular,
    luminance,
    segment_digits,
    stroke_width,
)

SIDE = 28  # of an MNIST image
BOX = 20  # longer side of its digit
STROKE_WIDTH = 0.125  # of its strokes, as a share of the digit's longer side
WORKING_SIDE = 280  # longer side of the image in which digits are searched
# Widths of the widest stroke; wider is background. The small one follows the edge of a shadow, the large one keeps the
# strokes of the thickest brush.
MAX_STROKE_WIDTHS = (75, 145)
EDGE_WIDTH = 4  # within which sharp ink ends
MAX_DEPTH = 2  # a sheet on a desk, and a frame on the sheet


class Candidate(NamedTuple):
    """Hold what may be the digit of an image.

    Attributes:
        digit: Shape (28, 28), bright on black; of images from folders, any shape of theirs.
        prior: How likely it is, 1 at most, before the network has seen it.
        box: Where it is in the image.
        plane: Whether it is dark (0), bright (1) or of another colour (2).
        is_solid: Whether its shape has neither bays nor holes, like that of a 1.
        is_sheet: Whether its outline is that of a sheet or a frame.
        is_outline: Whether it is as bulky as the outline of a digit, which surrounds counters.
    """

    digit: NDArray[np.uint8]
    prior: float = 1
    box: Box = (0, 0, SIDE, SIDE)
    plane: int = 1
    is_solid: bool = False
    is_sheet: bool = False
    is_outline: bool = False


def extract_candidates(image: Image.Image) -> list[Candidate]:
    """Find what may be the digit of an image of any size, mode and polarity; nothing if there is no ink."""
    colors = to_colors(image)
    if _is_mnist(colors):
        return [Candidate(np.round(255 * colors[..., 0]).astype(np.uint8))]
    candidates = _search(colors, max(image.size))
    return [candidate._replace(prior=candidate.prior * _weight(candidate, candidates)) for candidate in candidates]


def _weight(candidate: Candidate, others: Sequence[Candidate]) -> float:
    """Weigh down circles and boxes around digits, sheets, and the counters of digits."""
    height = candidate.box[2] - candidate.box[0]
    for other in others:
        is_same = other.plane == candidate.plane
        is_inside = other.box[2] - other.box[0] > 0.2 * height and _encloses(candidate.box, other.box)
        if is_same and is_inside and not candidate.is_outline:
            return 0.3
        is_counter = other.is_outline if is_same else candidate.is_solid and not other.is_sheet
        if is_counter and _encloses(other.box, candidate.box):
            return 0.3
    return 0.3 if candidate.is_sheet else 1


def _encloses(box: Box, other: Box) -> bool:
    return box[0] < other[0] and box[1] < other[1] and other[2] < box[2] and other[3] < box[3]


def choose(candidates: Sequence[Candidate], confidences: Sequence[float]) -> tuple[int, str]:
    """Choose a candidate by prior and confidence.

    Returns:
        Its index; a note which digit it is if there are several, else an empty one.
    """
    scores = [candidate.prior * confidence**2 for candidate, confidence in zip(candidates, confidences, strict=True)]
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    boxes = [candidates[order[0]].box]
    for index in order[1:]:
        box = candidates[index].box
        is_similar = 0.5 < (box[2] - box[0]) / (boxes[0][2] - boxes[0][0]) < 2
        if confidences[index] > 0.9 and is_similar and not any(_overlap(box, other) for other in boxes):
            boxes.append(box)
    if len(boxes) == 1:
        return order[0], ""
    axis = int(np.ptp([box[1] for box in boxes]) > np.ptp([box[0] for box in boxes]))
    position = sorted(box[axis] for box in boxes).index(boxes[0][axis]) + 1
    return order[0], f"digit {position} of {len(boxes)} from the {('top', 'left')[axis]}"


def _overlap(box: Box, other: Box) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]


def to_colors(image: Image.Image) -> Gray:
    """Convert an image to upright colours, shape (h, w, 3); what is transparent becomes a background of contrast."""
    image.draft(None, (4 * WORKING_SIDE, 4 * WORKING_SIDE))  # a JPEG can be decoded at a smaller size
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # more than eight bits, of which an unknown part is used
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        num_broken = min(1 + values.size // 5000, (values.size - 1) // 2)
        low, high = np.partition(values, (num_broken, -1 - num_broken), axis=None)[[num_broken, -1 - num_broken]]
        gray = np.clip((values - low) / max(float(high - low), 1e-6), 0, 1)
        return np.repeat(gray[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"), dtype=np.float64)
        is_dark = (np.asarray(image.convert("L")) * alpha).sum() <= 128 * alpha.sum()
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white" if is_dark else "black"), image)
    image = image.convert("RGB")
    image = image.reduce(max(1, max(image.size) // (4 * WORKING_SIDE)))  # the largest would not fit in memory as floats
    return np.asarray(image, dtype=np.float32) / 255


def _is_mnist(colors: Gray) -> bool:
    """Check whether an image has MNIST's form already."""
    gray = colors[..., 0]
    if gray.shape != (SIDE, SIDE) or np.ptp(colors, axis=2).any() or not gray.any():
        return False
    extents = [np.ptp(np.flatnonzero(gray.any(axis=axis))) + 1 for axis in (0, 1)]
    return max(extents) == BOX and bool(np.allclose(ndimage.center_of_mass(gray), SIDE / 2, atol=1.5))


def _search(
    colors: Gray, detail: int, origin: tuple[float, float] = (0, 0), inside: Mask | None = None, depth: int = 0
) -> list[Candidate]:
    """Find candidates in an image, or inside a region of it, and in the sheets and frames in that."""
    small = _resize(colors, WORKING_SIDE)
    if inside is None:
        outside = np.zeros(small.shape[:2], dtype=bool)
    else:  # what surrounds the region becomes like its nearest point, and what touches it is no digit
        outside = ~np.asarray(Image.fromarray(inside).resize(small.shape[1::-1], Image.Resampling.NEAREST))
        nearest = ndimage.distance_transform_edt(outside, return_distances=False, return_indices=True)
        small = small[tuple(nearest)]
        outside = ndimage.binary_dilation(outside, border_value=1)
    scale, (top, left) = max(colors.shape) / WORKING_SIDE, origin
    candidates: list[Candidate] = []
    for region in find_enclosed(small) if depth < MAX_DEPTH else ():
        rows, columns = (np.flatnonzero(region.any(axis=axis)) * 2 * scale for axis in (1, 0))
        part = colors[int(rows[0]) : int(rows[-1] + 2 * scale), int(columns[0]) : int(columns[-1] + 2 * scale)]
        candidates += _search(part, detail, (top + rows[0], left + columns[0]), crop(region), depth + 1)
    for digit, prior, edges, plane in _digits(small, max(EDGE_WIDTH, WORKING_SIDE // detail), outside):
        box = (*(start + scale * edge for start, edge in zip(2 * origin, edges, strict=True)),)
        hull = convex_hull_image(digit).sum()
        is_solid = bool(digit.sum() > 0.8 * hull)
        is_outline = bool(0.4 * hull < fill_holes(digit).sum() < 0.95 * hull)
        is_sheet = digit.shape[0] < 2 * digit.shape[1] and is_rectangular(digit)
        form = _center(_normalize_stroke_width(digit))
        candidates.append(Candidate(form, prior, box, plane, is_solid, is_sheet, is_outline))
    return candidates


def _digits(colors: Gray, edge_width: int, outside: Mask) -> Iterator[tuple[Mask, float, Box, int]]:
    """List digits of any polarity and stroke width."""
    for plane, (gray, prior) in enumerate(_planes(colors)):
        for max_width in MAX_STROKE_WIDTHS:
            digits = list(segment_digits(gray, estimate_ink(gray, max_width), edge_width, outside))
            yield from ((digit, prior * likelihood, box, plane) for digit, likelihood, box in digits)
            if digits and stroke_width(digits[0][0]) < max_width / 3:
                break


def _planes(colors: Gray) -> Iterator[tuple[Gray, float]]:
    """List images in which ink may be dark, with their priors: brightness, its inverse, difference of colour."""
    gray = luminance(colors)
    is_dark = _is_dark_on_bright(gray)
    yield gray, 1 if is_dark else 0.5
    yield 1 - gray, 0.5 if is_dark else 1
    if np.percentile(np.ptp(colors, axis=2), 99) > 0.1:
        difference = np.sqrt(((colors - np.median(colors, axis=(0, 1))) ** 2).sum(axis=2))
        # A colour map may go through brighter colours at the edge of the digit.
        yield 1 - np.minimum(difference / max(0.5 * difference.max(), 0.15), 1), 1


def _resize(colors: Gray, longer_side: int) -> Gray:
    scale = longer_side / max(colors.shape)
    height, width = (max(1, round(size * scale)) for size in colors.shape[:2])
    kernel = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    channels = np.moveaxis(np.atleast_3d(colors), 2, 0)
    resized = [np.asarray(Image.fromarray(channel).resize((width, height), kernel)) for channel in channels]
    return np.clip(np.stack(resized, axis=2).reshape(height, width, *colors.shape[2:]), 0, 1)


def _is_dark_on_bright(gray: Gray) -> bool:
    """Compare the strongest deviations from the local mean: are they dark?"""
    small = _resize(gray, WORKING_SIDE // 2)
    deviation = small - ndimage.gaussian_filter(small, WORKING_SIDE / 20, mode="nearest")
    return bool((deviation**3).sum() <= 0)


def _normalize_stroke_width(digit: Mask) -> Mask:
    """Dilate or erode strokes until they are about as wide as MNIST's."""
    target = STROKE_WIDTH * max(digit.shape)
    digit = np.pad(digit, round(target) + 1)
    width = stroke_width(digit)
    if width < 0.8 * target:
        digit = ndimage.distance_transform_edt(~digit) <= (0.9 * target - width) / 2
    elif width > 1.35 * target:
        # The skeleton keeps strokes together that are thinner than the others.
        skeleton = ndimage.distance_transform_edt(~skeletonize(digit)) <= 0.4 * target
        digit = (ndimage.distance_transform_edt(digit) > (width - 1.2 * target) / 2) | (skeleton & digit)
    return crop(digit)


def _center(digit: Mask) -> NDArray[np.uint8]:
    """Resize to a box of 20x20 and place it in 28x28 by the centre of mass."""
    scale = BOX / max(digit.shape)
    height, width = (max(1, round(size * scale)) for size in digit.shape)
    kernel = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
    small = np.asarray(Image.fromarray(digit.astype(np.float32)).resize((width, height), kernel))
    small = np.clip(1.15 * small, 0, 1)
    canvas = np.zeros((SIDE, SIDE), dtype=np.uint8)
    top, left = (
        int(np.clip(round((SIDE - 1) / 2 - center), 0, SIDE - size))
        for center, size in zip(ndimage.center_of_mass(small), small.shape, strict=True)
    )
    canvas[top : top + height, left : left + width] = np.round(255 * small)
    return canvas
