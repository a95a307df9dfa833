"""Extract the digit of any picture in the form of MNIST's images.

MNIST was made like that (LeCun, Cortes and Burges, "The MNIST database of handwritten digits"): ink as grey levels in a
box of 20x20 pixels that keeps its proportions, placed in 28x28 by its centre of mass.

What is ink and what is background cannot be known from a picture alone. So every reasonable answer becomes a candidate:
dark and bright strokes, strokes of another colour, the inside of every sheet, screen and frame, each of several
components. The network's confidence in them decides.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage.morphology import skeletonize

from mnist_lit.data.image_files import Candidate, upright
from mnist_lit.data.segmentation import Found, Mask, Region, find_digits, fit, stroke_width

SIDE = 28  # of an MNIST image
BOX = 20  # longer side of its digit
STROKE_WIDTH = 0.125  # of its strokes, as a share of the digit's longer side
MAX_SIDE = 1120  # of an image in which digits are searched, if it is a JPEG


def extract_candidates(image: Image.Image) -> list[Candidate]:
    """Find what may be the digit of an image of any size, mode and polarity; nothing if there is no ink."""
    image = upright(image, "RGB", MAX_SIDE)
    if _is_mnist(image):
        return [Candidate(np.array(image.convert("L")))]
    found = list(find_digits(image))
    candidates = []
    for each in found:
        is_unlikely = _is_sheet(each.region) or any(_is_frame_or_counter(each, other) for other in found)
        prior = each.likelihood * (0.3 if is_unlikely else 1)
        candidates.append(Candidate(_center(_normalize_stroke_width(each.region.image)), prior, each.box))
    return candidates


def _is_frame_or_counter(found: Found, other: Found) -> bool:
    """Check whether it surrounds another like a circle or box, or is surrounded like the counter of a digit."""
    is_same = other.plane == found.plane
    if _encloses(other.box, found.box):
        return _is_outline(other.region) if is_same else found.region.solidity > 0.8 and not _is_sheet(other.region)
    is_large = other.box[2] - other.box[0] > 0.2 * (found.box[2] - found.box[0])
    return is_same and is_large and _encloses(found.box, other.box) and not _is_outline(found.region)


def _is_outline(region: Region) -> bool:
    """Check whether it is as bulky as the outline of a digit, which surrounds counters."""
    return bool(0.4 < region.area_filled / region.area_convex < 0.95)


def _is_sheet(region: Region) -> bool:
    """Check whether a filled shape fills its smallest rectangle of any direction, like a sheet or a frame."""
    if region.image.shape[0] >= 2 * region.image.shape[1]:
        return False
    edge = np.argwhere(region.image_filled & ~ndimage.binary_erosion(region.image_filled))
    angles = np.linspace(0, np.pi / 2, 46)
    axes = np.stack([np.cos(angles), np.sin(angles)]), np.stack([-np.sin(angles), np.cos(angles)])
    height, width = (np.ptp(edge @ axis, axis=0) + 1 for axis in axes)
    return bool(region.area_filled > 0.88 * (height * width).min())


def _encloses(box: Sequence[float], other: Sequence[float]) -> bool:
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
        is_likely = scores[index] > 0.5 * scores[order[0]]
        if is_likely and is_similar and not any(_overlap(box, other) for other in boxes):
            boxes.append(box)
    if len(boxes) == 1:
        return order[0], ""
    axis = int(np.ptp([box[1] for box in boxes]) > np.ptp([box[0] for box in boxes]))
    position = sorted(box[axis] for box in boxes).index(boxes[0][axis]) + 1
    return order[0], f"digit {position} of {len(boxes)} from the {('top', 'left')[axis]}"


def _overlap(box: Sequence[float], other: Sequence[float]) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]


def _is_mnist(image: Image.Image) -> bool:
    """Check whether an image has MNIST's form already."""
    left, top, right, bottom = image.getbbox() or (0, 0, 0, 0)
    if image.size != (SIDE, SIDE) or max(right - left, bottom - top) != BOX:
        return False
    pixels = np.asarray(image)
    is_centered = np.allclose(ndimage.center_of_mass(pixels[..., 0]), SIDE / 2, atol=1.5)
    return is_centered and not np.ptp(pixels, axis=2).any()


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
    return digit[ndimage.find_objects(digit.astype(int))[0]]


def _center(digit: Mask) -> NDArray[np.uint8]:
    """Resize to a box of 20x20 and place it in 28x28 by the centre of mass."""
    small = np.asarray(fit(Image.fromarray(digit).convert("L"), BOX, Image.Resampling.BOX))
    canvas = np.zeros((SIDE, SIDE), dtype=np.uint8)
    top, left = (
        int(np.clip(round((SIDE - 1) / 2 - center), 0, SIDE - size))
        for center, size in zip(ndimage.center_of_mass(small), small.shape, strict=True)
    )
    canvas[top : top + small.shape[0], left : left + small.shape[1]] = small
    return canvas
