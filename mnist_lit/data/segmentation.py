"""Segment what may be digits in an image of one brightness: ink, its connected components, the parts of a digit."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.measure import label, regionprops

Gray = NDArray[Any]  # floats, 0 to 1
Mask = NDArray[np.bool_]
Box = tuple[float, float, float, float]  # top, left, bottom, right

MIN_CONTRAST = 0.02
SHARP = 0.3  # share of the contrast that is reached within the width of an edge
MIN_AREA = 30
MAX_COMPONENTS = 6  # that become candidates


def find_enclosed(colors: Gray) -> list[Mask]:
    """Find the insides of sheets, screens and frames, solid regions between others, at half the size."""
    gray = luminance(colors)[::2, ::2]  # much faster
    regions = []
    for mask in (gray > (threshold := threshold_otsu(gray)), gray <= threshold):
        for region in regionprops(label(mask)):
            if not 0.05 * mask.size < region.area_bbox < 0.97 * mask.size:
                continue
            filled = fill_holes(region.image)
            is_sheet = region.area > 0.5 * filled.sum()  # else a frame
            inside = np.zeros_like(mask)
            inside[region.slice] = ndimage.binary_erosion(filled if is_sheet else filled & ~region.image, iterations=2)
            if inside.sum() > max(0.4 * region.area_bbox, 0.03 * mask.size):
                regions.append(inside)
    return regions


def fill_holes(mask: Mask) -> Mask:
    """Fill what cannot be reached from outside; faster than SciPy's function, which dilates step by step."""
    outside = label(~np.pad(mask, 1), connectivity=1)
    return np.asarray(outside != outside[0, 0])[1:-1, 1:-1]


def is_rectangular(mask: Mask) -> bool:
    """Check whether a filled shape fills its smallest rectangle of any direction, like a sheet or a frame."""
    filled = fill_holes(mask)
    edge = np.argwhere(filled & ~ndimage.binary_erosion(filled))
    angles = np.linspace(0, np.pi / 2, 46)
    axes = np.stack([np.cos(angles), np.sin(angles)]), np.stack([-np.sin(angles), np.cos(angles)])
    height, width = (np.ptp(edge @ axis, axis=0) + 1 for axis in axes)
    return bool(filled.sum() > 0.88 * (height * width).min())


def luminance(colors: Gray) -> Gray:
    """Weigh red, green and blue as people see them."""
    return np.asarray(colors @ np.array([0.299, 0.587, 0.114], dtype=np.float32))


def estimate_ink(gray: Gray, max_width: int) -> Gray:
    """Estimate the share, 0 to 1, of the background's light that each pixel absorbs."""
    background = _background(gray, max_width)
    ink = (background - gray) / np.maximum(background, 0.2)  # in the dark, noise would count as ink
    return np.asarray(ndimage.gaussian_filter(np.clip(ink, 0, 1), 0.7))


def _background(gray: Gray, max_width: int) -> Gray:
    """Estimate the brightness without dark strokes up to a width by morphological closing."""
    height, width = gray.shape
    # At half the size, it takes a quarter of the time.
    half = Image.fromarray(gray).resize((max(1, width // 2), max(1, height // 2)), Image.Resampling.BOX)
    smooth = ndimage.median_filter(np.asarray(half), size=3)
    # Beyond the edges the brightness is extended as it is and as it changes: the first is too bright at the dark end of
    # a slope, the second beside ink at the edge.
    size = max_width // 2
    constant = np.pad(smooth, size, mode="edge")
    sloping = np.pad(smooth, size, mode="reflect", reflect_type="odd")
    constant, sloping = (ndimage.grey_closing(padded, size=size) for padded in (constant, sloping))
    closed = np.minimum(constant, sloping)[size:-size, size:-size]
    return np.asarray(Image.fromarray(closed).resize((width, height), Image.Resampling.BILINEAR))


def segment_digits(gray: Gray, ink: Gray, edge_width: int, outside: Mask) -> Iterator[tuple[Mask, float, Box]]:
    """Cut digits out of their surroundings, with likelihoods and boxes."""
    mask = (ink > threshold_otsu(ink)) & ~outside
    background = ~mask & ~outside
    if not mask.any() or not background.any():
        return
    contrast = float(ink[mask].mean() - ink[background].mean())
    if contrast <= max(MIN_CONTRAST, 6 * ink[background].std()):
        return
    for digit, likelihood, (top, left) in _likely_components(_remove_lines(_remove_lines(mask).T).T, outside):
        bottom, right = top + digit.shape[0], left + digit.shape[1]
        # A shadow ends more slowly than ink; what remains at the edge of a sheet is on one side no darker than it.
        distance = max(edge_width, round(0.6 * stroke_width(digit)))
        beside = np.pad(gray, distance, mode="edge")[top : bottom + 2 * distance, left : right + 2 * distance]
        away, nearest = ndimage.distance_transform_edt(
            np.pad(~digit, distance, constant_values=True), return_indices=True
        )
        steps = (beside - beside[tuple(nearest)]) / np.maximum(beside, 0.2)
        if (steps[(away > distance - 1) & (away <= distance)] > SHARP * contrast).mean() > 0.7:
            yield digit, likelihood, (top, left, bottom, right)


def _remove_lines(mask: Mask) -> Mask:
    """Remove horizontal lines from edge to edge: those of ruled or squared paper."""
    height, width = mask.shape
    thick = ndimage.binary_dilation(mask, np.ones((3, 1)))  # also finds a line that is not quite level
    runs = label(ndimage.grey_opening(thick.view(np.uint8), size=(1, max(5, width // 4))))
    lines = np.zeros_like(mask)
    for run in regionprops(runs):
        top, left, bottom, right = run.bbox
        if right - left > 0.85 * width and bottom - top < 0.12 * height:
            lines |= runs == run.label
    if not lines.any():
        return mask
    rest = mask & ~lines
    # Where ink crosses a line, it is on both sides of it.
    return np.asarray(rest | (ndimage.binary_closing(rest, np.ones((9, 3))) & lines & mask))


def _likely_components(mask: Mask, outside: Mask) -> Iterator[tuple[Mask, float, tuple[int, int]]]:
    """List the likely connected components: each with those close to it that are no specks, and each alone."""
    components = label(mask)
    cut_off = set(np.unique(components[ndimage.binary_dilation(outside)]))
    regions = [region for region in regionprops(components) if region.area >= MIN_AREA and region.label not in cut_off]
    likelihoods = {region.label: _likelihood(region, mask.shape) for region in regions}
    for main in sorted(regions, key=lambda region: -likelihoods[region.label])[:MAX_COMPONENTS]:
        top, left, bottom, right = main.bbox
        likelihood = (likelihoods[main.label] / max(likelihoods.values())) ** 0.5
        if likelihood < 0.1 or not _is_like_a_digit(main):
            continue
        gap = round(0.15 * max(bottom - top, right - left))
        distance = ndimage.distance_transform_edt(np.pad(~main.image, gap, constant_values=True))
        near = np.pad(components, gap)[top : bottom + 2 * gap, left : right + 2 * gap][distance <= gap]
        parts = [region for region in regions if region.label in near and region.area >= 0.04 * main.area]
        parts = [part for part in parts if part.bbox[0] < bottom or not _is_flat(part)]  # without an underline
        if len(parts) > 1:
            edges = np.array([part.bbox for part in parts])
            (start_y, start_x), (end_y, end_x) = edges[:, :2].min(axis=0), edges[:, 2:].max(axis=0)
            group = np.isin(components[start_y:end_y, start_x:end_x], [part.label for part in parts])
            yield group, likelihood, (start_y, start_x)
            likelihood *= 0.8
        yield main.image, likelihood, (top, left)
        filled = fill_holes(main.image)
        if 2 * main.area < filled.sum() < 0.95 * main.area_convex:  # perhaps the outline of a digit
            inner = fill_holes(filled & ~main.image & (components[main.slice] > 0))
            yield filled & ~inner, 0.8 * likelihood, (top, left)


def _is_flat(region: Any) -> bool:
    return bool(region.image.shape[0] < 0.3 * region.image.shape[1])


def _is_like_a_digit(region: Any) -> bool:
    """Tell a digit from a spot, a sheet and an underline."""
    height, width = region.image.shape
    if _is_flat(region) or stroke_width(region.image) > 0.4 * max(height, width):
        return False
    is_spot = region.area > 0.5 * region.area_bbox and region.solidity > 0.9
    return bool(height > 2 * width or not is_spot or region.area < 0.99 * fill_holes(region.image).sum())


def _likelihood(region: Any, shape: tuple[int, ...]) -> float:
    """Prefer components that are large, near the centre, and not cut off by the edge of the image."""
    (top, left, bottom, right), (height, width) = region.bbox, shape
    num_edges = (top == 0) + (left == 0) + (bottom == height) + (right == width)
    off_center_y, off_center_x = abs((top + bottom) / height - 1) / 2, abs((left + right) / width - 1) / 2
    return float(region.area * (1 - off_center_y) * (1 - off_center_x) * 0.25**num_edges)


def crop(mask: Mask) -> Mask:
    """Cut off rows and columns in which nothing is set."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def stroke_width(digit: Mask) -> float:
    """Estimate the width of strokes: their pixels are a quarter of it from the edge, on average."""
    depth = ndimage.distance_transform_edt(np.pad(digit, 1))
    return float(4 * depth[depth > 0].mean() - 1)
