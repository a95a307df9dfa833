"""Extract the digit of any picture in the form of MNIST's images.

MNIST was made like that (LeCun, Cortes and Burges, "The MNIST database of handwritten digits"): ink as grey levels in a
box of 20x20 pixels that keeps its proportions, placed in 28x28 by its centre of mass.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.measure import label, regionprops
from skimage.morphology import skeletonize

__all__ = ["extract_digit", "to_grayscale"]

Gray = NDArray[Any]  # floats, 0 to 1
Mask = NDArray[np.bool_]

SIDE = 28  # of an MNIST image
BOX = 20  # longer side of its digit
STROKE_WIDTH = 0.125  # of its strokes, as a share of the digit's longer side
WORKING_SIDE = 280  # longer side of the image in which the digit is searched
POLARITY_SIDE = 140  # longer side of the image in which bright and dark ink are told apart
# Widths of the widest stroke; wider is background. The small one follows the edge of a shadow, the large one keeps the
# strokes of the thickest brush.
MAX_STROKE_WIDTHS = (75, 145)
EDGE_WIDTH = 4  # within which sharp ink ends
MIN_CONTRAST = 0.08
MIN_AREA = 30


def extract_digit(image: Image.Image) -> NDArray[np.uint8] | None:
    """Find the digit of an image of any size and mode, dark on light or light on dark.

    Returns:
        The digit, of shape (28, 28), bright on black; None if there is no ink.
    """
    gray = _resize(to_grayscale(image), WORKING_SIDE)
    if not _is_dark_on_bright(gray):
        gray = 1 - gray
    edge_width = max(EDGE_WIDTH, WORKING_SIDE // max(image.size))
    digit = None
    for max_width in MAX_STROKE_WIDTHS:
        found = _segment_digit(_ink(gray, max_width), edge_width)
        digit = digit if found is None else found
        if digit is not None and _stroke_width(digit) < max_width / 2:
            break
    return None if digit is None else _center(_normalize_stroke_width(digit))


def to_grayscale(image: Image.Image) -> Gray:
    """Convert an image to upright brightness, 0 to 1, on a background that contrasts with what is not transparent."""
    image.draft("L", (4 * WORKING_SIDE, 4 * WORKING_SIDE))  # a JPEG can be decoded at a smaller size
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # more than eight bits, of which an unknown part is used
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        return (values - values.min()) / max(float(np.ptp(values)), 1e-6)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        *_, alpha = image.split()
        visible = np.asarray(image.convert("L"))[np.asarray(alpha) > 127]
        is_dark = visible.size == 0 or visible.mean() < 128
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white" if is_dark else "black"), image)
    image = image.convert("L")
    image = image.reduce(max(1, max(image.size) // (4 * WORKING_SIDE)))  # the largest would not fit in memory as floats
    return np.asarray(image, dtype=np.float32) / 255


def _resize(gray: Gray, longer_side: int) -> Gray:
    scale = longer_side / max(gray.shape)
    height, width = (max(1, round(size * scale)) for size in gray.shape)
    kernel = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(gray).resize((width, height), kernel))


def _is_dark_on_bright(gray: Gray) -> bool:
    """Compare the strongest deviations from the local mean: are they dark?"""
    small = _resize(gray, POLARITY_SIDE)
    deviation = small - ndimage.gaussian_filter(small, POLARITY_SIDE / 10, mode="nearest")
    return bool((deviation**3).sum() <= 0)


def _ink(gray: Gray, max_width: int) -> Gray:
    """Estimate the share, 0 to 1, of the background's light that each pixel absorbs."""
    background = _background(gray, max_width)
    ink = (background - gray) / np.maximum(background, 0.2)  # in the dark, noise would count as ink
    return ndimage.gaussian_filter(np.clip(ink, 0, 1), 0.7)


def _background(gray: Gray, max_width: int) -> Gray:
    """Estimate the brightness without dark strokes up to a width by morphological closing."""
    smooth = ndimage.median_filter(gray, size=5)
    # Beyond the edges the brightness is extended as it is and as it changes: the first is too bright at the dark end of
    # a slope, the second beside ink at the edge.
    constant = np.pad(smooth, max_width, mode="edge")
    sloping = np.pad(smooth, max_width, mode="reflect", reflect_type="odd")
    constant, sloping = (ndimage.grey_closing(padded, size=max_width) for padded in (constant, sloping))
    inside = slice(max_width, -max_width)
    return np.minimum(constant, sloping)[inside, inside]


def _segment_digit(ink: Gray, edge_width: int) -> Mask | None:
    """Cut the digit out of its surroundings; return None if there is none."""
    mask = ink > threshold_otsu(ink)
    if not mask.any() or mask.all() or _contrast(ink, mask, ~mask) <= max(MIN_CONTRAST, 6 * ink[~mask].std()):
        return None
    digit = _main_component(_remove_lines(_remove_lines(mask).T).T)
    if digit.sum() < MIN_AREA:
        return None
    # A shadow ends more slowly than ink.
    inside = digit & ~ndimage.binary_erosion(digit, iterations=edge_width, border_value=1)
    outside = ndimage.binary_dilation(digit, iterations=edge_width) & ~digit
    is_sharp = _contrast(ink, inside, outside) > 0.5 * _contrast(ink, digit, ~digit)
    return _crop(digit) if is_sharp else None


def _contrast(ink: Gray, foreground: Mask, background: Mask) -> float:
    return float(ink[foreground].mean() - ink[background].mean())


def _remove_lines(mask: Mask) -> Mask:
    """Remove horizontal lines from edge to edge: those of ruled or squared paper."""
    height, width = mask.shape
    thick = ndimage.binary_dilation(mask, np.ones((3, 1)))  # also finds a line that is not quite level
    runs = label(ndimage.binary_opening(thick, np.ones((1, max(5, width // 4)))))
    lines = np.zeros_like(mask)
    for run in regionprops(runs):
        top, left, bottom, right = run.bbox
        if right - left > 0.85 * width and bottom - top < 0.12 * height:
            lines |= runs == run.label
    if not lines.any():
        return mask
    rest = mask & ~lines
    # Where ink crosses a line, it is on both sides of it.
    return rest | (ndimage.binary_closing(rest, np.ones((9, 3))) & lines & mask)


def _main_component(mask: Mask) -> Mask:
    """Keep the most likely connected component and those close to it that are no specks."""
    components = label(mask)
    regions = regionprops(components)
    if not regions:
        return mask
    main = max(regions, key=lambda region: _likelihood(region, mask.shape))
    top, left, bottom, right = main.bbox
    near = ndimage.distance_transform_edt(components != main.label) <= 0.15 * max(bottom - top, right - left)
    near_labels = set(np.unique(components[near]))
    parts = [region.label for region in regions if region.label in near_labels and region.area >= 0.04 * main.area]
    return np.isin(components, parts)


def _likelihood(region: Any, shape: tuple[int, ...]) -> float:
    """Prefer components that are large, near the centre, and not cut off by the edge of the image."""
    (top, left, bottom, right), (height, width) = region.bbox, shape
    num_edges = (top == 0) + (left == 0) + (bottom == height) + (right == width)
    off_center_y, off_center_x = abs((top + bottom) / height - 1) / 2, abs((left + right) / width - 1) / 2
    return float(region.area * (1 - off_center_y) * (1 - off_center_x) * 0.25**num_edges)


def _crop(mask: Mask) -> Mask:
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _normalize_stroke_width(digit: Mask) -> Mask:
    """Dilate or erode strokes until they are about as wide as MNIST's."""
    target = STROKE_WIDTH * max(digit.shape)
    digit = np.pad(digit, round(target) + 1)
    width = _stroke_width(digit)
    if width < 0.8 * target:
        digit = ndimage.distance_transform_edt(~digit) <= (0.9 * target - width) / 2
    elif width > 1.35 * target:
        # The skeleton keeps strokes together that are thinner than the others.
        skeleton = ndimage.distance_transform_edt(~skeletonize(digit)) <= 0.4 * target
        digit = (ndimage.distance_transform_edt(digit) > (width - 1.2 * target) / 2) | (skeleton & digit)
    return _crop(digit)


def _stroke_width(digit: Mask) -> float:
    """Estimate the width of strokes: their pixels are a quarter of it from the edge, on average."""
    depth = ndimage.distance_transform_edt(np.pad(digit, 1))
    return float(4 * depth[depth > 0].mean() - 1)


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
