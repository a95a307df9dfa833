"""Anyone's picture of a digit, brought into the form of MNIST's images.

They were made like that (LeCun, Cortes and Burges, "The MNIST database of handwritten digits"): ink as grey levels in a
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

__all__ = ["digit_in", "grey_of"]

Grey = NDArray[Any]  # floats, 0 to 1
Mask = NDArray[np.bool_]

SIDE = 28
BOX = 20
WORKING_SIDE = 280  # pixels of the longer side while the digit is looked for
SURVEY_SIDE = 140  # the same for the question whether ink is dark or bright
# Pixels; what is wider is paper. The narrow one can follow a shadow's edge, the wide one sees the thickest brush.
WIDEST_INK = (75, 145)
LEAST_CONTRAST = 0.08
SHARP = 4  # pixels within which ink ends and paper begins
LEAST_AREA = 30  # pixels of ink
STROKE = 0.125  # width of MNIST's strokes, as a share of the digit's longer side


def digit_in(image: Image.Image) -> NDArray[np.uint8] | None:
    """Find the one digit in an image.

    Args:
        image: Of any size and mode: a photograph, a scan or a drawing, dark on light or light on dark.

    Returns:
        The digit as MNIST shows it, of shape (28, 28), bright ink on black; None where there is no ink.
    """
    grey = _resized(grey_of(image), WORKING_SIDE)
    if not _is_dark(grey):
        grey = 1 - grey
    blur = max(SHARP, WORKING_SIDE // max(image.size))
    digit = None
    for widest in WIDEST_INK:
        digit = _digit(_ink(grey, widest), blur, otherwise=digit)
        if digit is not None and _stroke_width(digit) < widest / 2:
            break
    return None if digit is None else _framed(_restroked(digit))


# Ink and paper


def grey_of(image: Image.Image) -> Grey:
    """Brightness, 0 to 1, of the image as it is meant to be seen."""
    image.draft("L", (4 * WORKING_SIDE, 4 * WORKING_SIDE))  # a JPEG can be decoded small
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # more than eight bits, of which nobody says how many are used
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        return (values - values.min()) / max(float(np.ptp(values)), 1e-6)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        *_, alpha = image.split()
        visible = np.asarray(image.convert("L"))[np.asarray(alpha) > 127]
        is_dark = visible.size == 0 or visible.mean() < 128
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white" if is_dark else "black"), image)
    image = image.convert("L")
    image = image.reduce(max(1, max(image.size) // (4 * WORKING_SIDE)))  # of the largest, numbers would fill the memory
    return np.asarray(image, dtype=np.float32) / 255


def _resized(grey: Grey, longer_side: int) -> Grey:
    scale = longer_side / max(grey.shape)
    height, width = (max(1, round(size * scale)) for size in grey.shape)
    kernel = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(grey).resize((width, height), kernel))


def _is_dark(grey: Grey) -> bool:
    """Whether what differs most from its surroundings is darker than they are."""
    small = _resized(grey, SURVEY_SIDE)
    difference = small - ndimage.gaussian_filter(small, SURVEY_SIDE / 10, mode="nearest")
    return bool((difference**3).sum() <= 0)


def _ink(grey: Grey, widest: int) -> Grey:
    """Share, 0 to 1, of the paper's light that each pixel swallows."""
    paper = _paper(grey, widest)
    ink = (paper - grey) / np.maximum(paper, 0.2)  # in the dark, noise would look like ink
    return ndimage.gaussian_filter(np.clip(ink, 0, 1), 0.7)


def _paper(grey: Grey, widest: int) -> Grey:
    """Brightness without what is dark and narrow, in any light; whatever lies around a sheet counts as paper, too."""
    smooth = ndimage.median_filter(grey, size=5)
    # Beyond the edges the light goes on as it is, or as it changes: the one is too bright at the dark end of a slope,
    # the other beside ink at the edge.
    level = np.pad(smooth, widest, mode="edge")
    sloping = np.pad(smooth, widest, mode="reflect", reflect_type="odd")
    level, sloping = (ndimage.grey_closing(padded, size=widest) for padded in (level, sloping))
    inside = slice(widest, -widest)
    return np.minimum(level, sloping)[inside, inside]


def _stands_out(ink: Grey, mask: Mask) -> bool:
    if not mask.any() or mask.all():
        return False
    contrast = ink[mask].mean() - ink[~mask].mean()
    return bool(contrast > max(LEAST_CONTRAST, 6 * ink[~mask].std()))


def _is_sharp(ink: Grey, digit: Mask, blur: int) -> bool:
    """Whether it ends as ink does, within `blur` pixels, and not as a shadow."""
    inside = digit & ~ndimage.binary_erosion(digit, iterations=blur, border_value=1)
    outside = ndimage.binary_dilation(digit, iterations=blur) & ~digit
    step = ink[inside].mean() - ink[outside].mean()
    return bool(step > 0.5 * (ink[digit].mean() - ink[~digit].mean()))


# The digit among the ink


def _without_lines(mask: Mask) -> Mask:
    """Without lines from edge to edge: those of ruled and squared paper."""
    return _without_rows(_without_rows(mask).T).T


def _without_rows(mask: Mask) -> Mask:
    height, width = mask.shape
    thick = ndimage.binary_dilation(mask, np.ones((3, 1)))  # a line that is not quite level is still one
    runs = label(ndimage.binary_opening(thick, np.ones((1, max(5, width // 4)))))
    lines = np.zeros_like(mask)
    for run in regionprops(runs):
        top, left, bottom, right = run.bbox
        if right - left > 0.85 * width and bottom - top < 0.12 * height:
            lines |= runs == run.label
    if not lines.any():
        return mask
    kept = mask & ~lines
    # Ink that crosses a line goes on beyond it.
    return kept | (ndimage.binary_closing(kept, np.ones((9, 3))) & lines & mask)


def _digit(ink: Grey, blur: int, otherwise: Mask | None) -> Mask | None:
    """The digit, cut out of its surroundings, or else what is found `otherwise`."""
    mask = ink > threshold_otsu(ink)
    if not _stands_out(ink, mask):
        return otherwise
    digit = _plausible(_without_lines(mask))
    if digit.sum() < LEAST_AREA or not _is_sharp(ink, digit, blur):
        return otherwise
    return _cropped(digit)


def _plausible(mask: Mask) -> Mask:
    """The largest plausible piece of ink, with the pieces that belong to it."""
    pieces = label(mask)
    regions = regionprops(pieces)
    if not regions:
        return mask
    main = max(regions, key=lambda region: _plausibility(region.area, region.bbox, mask.shape))
    top, left, bottom, right = main.bbox
    near = ndimage.distance_transform_edt(pieces != main.label) <= 0.15 * max(bottom - top, right - left)
    close = set(np.unique(pieces[near]))
    parts = [region.label for region in regions if region.label in close and region.area >= 0.04 * main.area]
    return np.isin(pieces, parts)


def _plausibility(area: float, bbox: tuple[int, int, int, int], shape: tuple[int, ...]) -> float:
    """Large, near the middle, and not cut off by the edge of the image."""
    top, left, bottom, right = bbox
    height, width = shape
    num_touched = (top == 0) + (left == 0) + (bottom == height) + (right == width)
    off_centre_y, off_centre_x = abs((top + bottom) / height - 1) / 2, abs((left + right) / width - 1) / 2
    return area * (1 - off_centre_y) * (1 - off_centre_x) * 0.25**num_touched


def _cropped(mask: Mask) -> Mask:
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


# MNIST's form


def _restroked(digit: Mask) -> Mask:
    """The same strokes, about as wide as MNIST's."""
    usual = STROKE * max(digit.shape)
    digit = np.pad(digit, round(usual) + 1)
    width = _stroke_width(digit)
    if width < 0.8 * usual:
        digit = ndimage.distance_transform_edt(~digit) <= (0.9 * usual - width) / 2
    elif width > 1.35 * usual:
        # What is left of a stroke that is thinner than the others must not break.
        spine = ndimage.distance_transform_edt(~skeletonize(digit)) <= 0.4 * usual
        digit = (ndimage.distance_transform_edt(digit) > (width - 1.2 * usual) / 2) | (spine & digit)
    return _cropped(digit)


def _stroke_width(digit: Mask) -> float:
    """Width of the strokes, in pixels: a pixel of a stroke is a quarter of that from its edge, on average."""
    depth = ndimage.distance_transform_edt(np.pad(digit, 1))
    return float(4 * depth[depth > 0].mean() - 1)


def _framed(digit: Mask) -> NDArray[np.uint8]:
    scale = BOX / max(digit.shape)
    height, width = (max(1, round(size * scale)) for size in digit.shape)
    kernel = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
    small = np.asarray(Image.fromarray(digit.astype(np.float32)).resize((width, height), kernel))
    small = np.clip(1.15 * small, 0, 1)
    frame = np.zeros((SIDE, SIDE), dtype=np.uint8)
    centre = ndimage.center_of_mass(small)
    top, left = (
        int(np.clip(round((SIDE - 1) / 2 - middle), 0, SIDE - size))
        for middle, size in zip(centre, small.shape, strict=True)
    )
    frame[top : top + height, left : left + width] = np.round(255 * small)
    return frame
