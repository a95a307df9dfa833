"""Segment what may be digits in an image: regions, ink in them, its connected components, the parts of a digit."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.measure import label, regionprops

Gray = NDArray[Any]  # floats, 0 to 1
Mask = NDArray[np.bool_]
Region: TypeAlias = Any  # skimage's RegionProperties

SIDE = 280  # longer side of what digits are searched in
MAX_STROKE_WIDTH = 75  # of a thick brush; wider is background
MIN_CONTRAST = 0.02
EDGE_WIDTH = 4  # within which sharp ink ends
SHARP = 0.3  # share of the contrast that is reached within the width of an edge
MIN_AREA = 30  # of what is no speck
MAX_COMPONENTS = 6  # that become candidates


class Found(NamedTuple):
    """Hold what may be a digit.

    Attributes:
        region: Its pixels in the resized image.
        box: Where it is in the image: top, left, bottom, right.
        plane: Whether it is dark (0), bright (1) or of another colour (2).
        likelihood: How likely it is, 1 at most.
    """

    region: Region
    box: Sequence[float]
    plane: int
    likelihood: float


def find_digits(image: Image.Image) -> Iterator[Found]:
    """Find what may be digits in an image, and inside the sheets, screens and frames in it."""
    for (left, top, right, bottom), inside in _find_regions(image):
        part = image.crop((left, top, right, bottom))
        scale = max(part.size) / SIDE
        part = fit(part, SIDE)
        # What surrounds the inside becomes like its nearest point.
        outside = ~np.asarray(Image.fromarray(inside).resize(part.size, Image.Resampling.NEAREST))
        nearest = ndimage.distance_transform_edt(outside, return_distances=False, return_indices=True)
        colors = (np.asarray(part, dtype=np.float32) / 255)[tuple(nearest)]
        for plane, (gray, prior) in enumerate(_planes(colors)):
            for region, likelihood in _segment(gray, max(EDGE_WIDTH, round(1 / scale))):
                edges = scale * np.array(region.bbox) + (top, left, top, left)
                yield Found(region, edges.tolist(), plane, prior * likelihood)


def _find_regions(image: Image.Image) -> Iterator[tuple[tuple[float, ...], Mask]]:
    """List boxes and masks of any size: all of the image, and solid regions between others, like sheets and frames."""
    yield (0, 0, *image.size), np.ones((1, 1), dtype=bool)
    gray = np.asarray(fit(image.convert("L"), SIDE // 2))  # much faster
    scale = max(image.size) / max(gray.shape)
    for mask in (gray > (threshold := threshold_otsu(gray)), gray <= threshold):
        for region in regionprops(label(mask)):
            if 0.05 * mask.size < region.area_bbox < 0.97 * mask.size:
                inside = ndimage.binary_erosion(region.image_filled, iterations=2)
                if inside.sum() > max(0.4 * region.area_bbox, 0.03 * mask.size):
                    top, left, bottom, right = (scale * edge for edge in region.bbox)
                    yield (left, top, right, bottom), inside


def _planes(colors: Gray) -> Iterator[tuple[Gray, float]]:
    """List images in which ink may be dark, with their priors: brightness, its inverse, difference of colour."""
    gray = colors @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    # The strongest deviations from the local mean are those of ink.
    deviation = gray - ndimage.gaussian_filter(gray, SIDE / 10, mode="nearest")
    is_dark = (deviation**3).sum() <= 0
    yield gray, 1 if is_dark else 0.5
    yield 1 - gray, 0.5 if is_dark else 1
    if np.percentile(np.ptp(colors, axis=2), 99) > 0.1:
        yield 1 - np.linalg.norm(colors - np.median(colors, axis=(0, 1)), axis=2) / 3**0.5, 1


def fit(image: Image.Image, side: int, kernel: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """Resize an image so that its longer side is `side`."""
    width, height = (max(1, round(edge * side / max(image.size))) for edge in image.size)
    return image.resize((width, height), kernel)


def _segment(gray: Gray, edge_width: int) -> Iterator[tuple[Region, float]]:
    """Cut dark digits out of their surroundings, with likelihoods."""
    ink = _estimate_ink(gray)
    mask = ink > threshold_otsu(ink)
    if not mask.any():
        return
    contrast = float(ink[mask].mean() - ink[~mask].mean())
    if contrast <= max(MIN_CONTRAST, 6 * ink[~mask].std()):
        return
    for digit, likelihood in _likely_components(_remove_lines(_remove_lines(mask).T).T):
        [region] = regionprops(digit.view(np.uint8))
        # A shadow ends more slowly than ink; what remains at the edge of a sheet is on one side no darker than it.
        distance = max(edge_width, round(0.6 * stroke_width(region.image)))
        window = _window(region, distance)
        away, nearest = ndimage.distance_transform_edt(~digit[window], return_indices=True)
        beside = gray[window]
        steps = (beside - beside[tuple(nearest)]) / np.maximum(beside, 0.2)
        if (steps[(away > distance - 1) & (away <= distance)] > SHARP * contrast).mean() > 0.7:
            yield region, likelihood


def _estimate_ink(gray: Gray) -> Gray:
    """Estimate the share, 0 to 1, of the background's light that each pixel absorbs.

    The background is the brightness without dark strokes, by morphological closing.
    """
    half = np.asarray(fit(Image.fromarray(gray), SIDE // 2))  # takes a quarter of the time
    size = MAX_STROKE_WIDTH // 2
    smooth = np.pad(ndimage.median_filter(half, size=3), size, mode="edge")
    closed = Image.fromarray(ndimage.grey_closing(smooth, size=size)[size:-size, size:-size])
    background = np.asarray(closed.resize(gray.shape[::-1], Image.Resampling.BILINEAR))
    ink = (background - gray) / np.maximum(background, 0.2)  # in the dark, noise would count as ink
    return np.asarray(ndimage.gaussian_filter(np.clip(ink, 0, 1), 0.7))


def _window(region: Region, margin: int) -> tuple[slice, ...]:
    return tuple(slice(max(0, side.start - margin), side.stop + margin) for side in region.slice)


def _remove_lines(mask: Mask) -> Mask:
    """Remove horizontal lines from edge to edge: those of ruled or squared paper."""
    height, width = mask.shape
    thick = ndimage.binary_dilation(mask, np.ones((3, 1)))  # also finds a line that is not quite level
    runs = label(ndimage.grey_opening(thick.view(np.uint8), size=(1, max(5, width // 4))))
    lines = np.zeros_like(mask)
    for run in regionprops(runs):
        if run.image.shape[1] > 0.85 * width and run.image.shape[0] < 0.12 * height:
            lines |= runs == run.label
    rest = mask & ~lines
    # Where ink crosses a line, it is on both sides of it.
    return np.asarray(rest | (ndimage.binary_closing(rest, np.ones((9, 3))) & lines & mask))


def _likely_components(mask: Mask) -> Iterator[tuple[Mask, float]]:
    """List the likely connected components: each with those close to it that are no specks, and each alone."""
    components = label(mask)
    regions = [region for region in regionprops(components) if region.area >= MIN_AREA]
    likelihoods = {region.label: _likelihood(region, mask.shape) for region in regions}
    for main in sorted(regions, key=lambda region: -likelihoods[region.label])[:MAX_COMPONENTS]:
        likelihood = (likelihoods[main.label] / max(likelihoods.values())) ** 0.5
        if likelihood < 0.1 or _is_flat(main) or stroke_width(main.image) > 0.4 * max(main.image.shape):
            continue
        alone = components == main.label
        window = _window(main, gap := round(0.15 * max(main.image.shape)))
        near = components[window][ndimage.distance_transform_edt(~alone[window]) <= gap]
        parts = [region for region in regions if region.label in near and region.area >= 0.04 * main.area]
        parts = [part for part in parts if part.bbox[0] < main.bbox[2] or not _is_flat(part)]  # without an underline
        if len(parts) > 1:
            yield np.isin(components, [part.label for part in parts]), likelihood
            likelihood *= 0.8
        yield alone, likelihood
        if 2 * main.area < main.area_filled < 0.95 * main.area_convex:  # perhaps the outline of a digit
            within = ndimage.binary_fill_holes(main.image_filled & ~main.image & mask[main.slice])
            outline = np.zeros_like(mask)
            outline[main.slice] = main.image_filled & ~within
            yield outline, 0.8 * likelihood


def _is_flat(region: Region) -> bool:
    return bool(region.image.shape[0] < 0.3 * region.image.shape[1])


def _likelihood(region: Region, shape: tuple[int, ...]) -> float:
    """Prefer components that are large and near the centre of the image."""
    off_center = abs(np.add(region.bbox[:2], region.bbox[2:]) / shape - 1) / 2
    return float(region.area * (1 - off_center).prod())


def stroke_width(digit: Mask) -> float:
    """Estimate the width of strokes: their pixels are a quarter of it from the edge, on average."""
    depth = ndimage.distance_transform_edt(np.pad(digit, 1))
    return float(4 * depth[depth > 0].mean() - 1)
