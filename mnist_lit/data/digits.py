"""Extract the digit of any picture in the form of MNIST's images.

MNIST was made like that (LeCun, Cortes and Burges, "The MNIST database of handwritten digits"): ink as grey levels in a
box of 20x20 pixels that keeps its proportions, placed in 28x28 by its centre of mass.

What is ink and what is background cannot be known from a picture alone. So every reasonable answer becomes a candidate:
dark and bright strokes, strokes of another colour, the inside of every sheet, screen and frame, each of several
components. The network's confidence in them decides.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.measure import label, regionprops
from skimage.morphology import convex_hull_image, skeletonize

__all__ = ["Candidate", "choose", "extract_candidates", "to_colors"]

Gray = NDArray[Any]  # floats, 0 to 1
Mask = NDArray[np.bool_]
Box = tuple[float, float, float, float]  # top, left, bottom, right

SIDE = 28  # of an MNIST image
BOX = 20  # longer side of its digit
STROKE_WIDTH = 0.125  # of its strokes, as a share of the digit's longer side
WORKING_SIDE = 280  # longer side of the image in which digits are searched
# Widths of the widest stroke; wider is background. The small one follows the edge of a shadow, the large one keeps the
# strokes of the thickest brush.
MAX_STROKE_WIDTHS = (75, 145)
EDGE_WIDTH = 4  # within which sharp ink ends
MIN_CONTRAST = 0.02
SHARP = 0.4  # share of the contrast that is reached within the width of an edge
MIN_AREA = 30
MAX_COMPONENTS = 6  # that become candidates
MAX_DEPTH = 2  # a sheet on a desk, and a frame on the sheet


class Candidate(NamedTuple):
    """Hold what may be the digit of an image.

    Attributes:
        digit: Shape (28, 28), bright on black.
        prior: How likely it is, 1 at most, before the network has seen it.
        box: Where it is in the image.
        plane: Whether it is dark (0), bright (1) or of another colour (2).
        is_solid: Whether its shape has neither bays nor holes, like that of a 1.
        is_convex: Whether its outline has no bays, like that of a 0.
    """

    digit: NDArray[np.uint8]
    prior: float
    box: Box
    plane: int
    is_solid: bool
    is_convex: bool


def extract_candidates(image: Image.Image) -> list[Candidate]:
    """Find what may be the digit of an image of any size, mode and polarity; nothing if there is no ink."""
    colors = to_colors(image)
    if _is_mnist(colors):
        return [
            Candidate(
                np.round(255 * colors[..., 0]).astype(np.uint8),
                1,
                (0, 0, SIDE, SIDE),
                plane=1,
                is_solid=False,
                is_convex=False,
            )
        ]
    candidates = _search(colors, max(image.size))
    return [candidate._replace(prior=candidate.prior * _weight(candidate, candidates)) for candidate in candidates]


def _weight(candidate: Candidate, others: Sequence[Candidate]) -> float:
    """Weigh down what is around a digit (circles, boxes, sheets) and the counters of digits."""
    height = candidate.box[2] - candidate.box[0]
    for other in others:
        is_same = other.plane == candidate.plane
        is_frame = is_same or (candidate.is_convex and not other.is_solid)
        if is_frame and other.box[2] - other.box[0] > 0.2 * height and _encloses(candidate.box, other.box):
            return 0.3
        if not is_same and candidate.is_solid and _encloses(other.box, candidate.box):
            return 0.3
    return 1


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
    for region in _enclosed(small) if depth < MAX_DEPTH else ():
        rows, columns = (np.flatnonzero(region.any(axis=axis)) * 2 * scale for axis in (1, 0))
        crop = colors[int(rows[0]) : int(rows[-1] + 2 * scale), int(columns[0]) : int(columns[-1] + 2 * scale)]
        candidates += _search(crop, detail, (top + rows[0], left + columns[0]), _crop(region), depth + 1)
    for digit, prior, edges, plane in _digits(small, max(EDGE_WIDTH, WORKING_SIDE // detail), outside):
        box = (*(start + scale * edge for start, edge in zip(2 * origin, edges, strict=True)),)
        hull = convex_hull_image(digit).sum()
        is_solid, is_convex = digit.sum() > 0.8 * hull, ndimage.binary_fill_holes(digit).sum() > 0.9 * hull
        candidates.append(Candidate(_center(_normalize_stroke_width(digit)), prior, box, plane, is_solid, is_convex))
    return candidates


def _digits(colors: Gray, edge_width: int, outside: Mask) -> Iterator[tuple[Mask, float, Box, int]]:
    """List digits of any polarity and stroke width."""
    for plane, (gray, prior) in enumerate(_planes(colors)):
        for max_width in MAX_STROKE_WIDTHS:
            digits = list(_segment_digits(gray, _ink(gray, max_width), edge_width, outside))
            yield from ((digit, prior * likelihood, box, plane) for digit, likelihood, box in digits)
            if digits and _stroke_width(digits[0][0]) < max_width / 3:
                break


def _enclosed(colors: Gray) -> list[Mask]:
    """Find the insides of sheets, screens and frames, solid regions between others, at half the size."""
    gray = _luminance(colors)[::2, ::2]  # much faster
    regions = []
    for mask in (gray > (threshold := threshold_otsu(gray)), gray <= threshold):
        components = label(mask)
        for region in regionprops(components):
            if not 0.05 * mask.size < region.area_bbox < 0.97 * mask.size:
                continue
            component = components == region.label
            filled = ndimage.binary_fill_holes(component)
            inside = filled if region.area > 0.5 * filled.sum() else filled & ~component
            inside = ndimage.binary_erosion(inside, iterations=2)
            if inside.sum() > max(0.4 * region.area_bbox, 0.03 * mask.size):
                regions.append(inside)
    return regions


def _planes(colors: Gray) -> Iterator[tuple[Gray, float]]:
    """List images in which ink may be dark, with their priors: brightness, its inverse, difference of colour."""
    gray = _luminance(colors)
    is_dark = _is_dark_on_bright(gray)
    yield gray, 1 if is_dark else 0.5
    yield 1 - gray, 0.5 if is_dark else 1
    if np.percentile(np.ptp(colors, axis=2), 99) > 0.1:
        difference = np.sqrt(((colors - np.median(colors, axis=(0, 1))) ** 2).sum(axis=2))
        # A colour map may go through brighter colours at the edge of the digit.
        yield 1 - np.minimum(difference / max(0.5 * difference.max(), 0.15), 1), 1


def _luminance(colors: Gray) -> Gray:
    return np.asarray(colors @ np.array([0.299, 0.587, 0.114], dtype=np.float32))


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


def _ink(gray: Gray, max_width: int) -> Gray:
    """Estimate the share, 0 to 1, of the background's light that each pixel absorbs."""
    background = _background(gray, max_width)
    ink = (background - gray) / np.maximum(background, 0.2)  # in the dark, noise would count as ink
    return ndimage.gaussian_filter(np.clip(ink, 0, 1), 0.7)


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


def _segment_digits(gray: Gray, ink: Gray, edge_width: int, outside: Mask) -> Iterator[tuple[Mask, float, Box]]:
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
        distance = max(edge_width, round(0.6 * _stroke_width(digit)))
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


def _is_flat(region: Any) -> bool:
    return bool(region.image.shape[0] < 0.3 * region.image.shape[1])


def _is_like_a_digit(region: Any) -> bool:
    """Tell a digit from a spot, a sheet and an underline."""
    height, width = region.image.shape
    if _is_flat(region) or _stroke_width(region.image) > 0.4 * max(height, width):
        return False
    return bool(height > 2 * width or region.area < 0.5 * region.area_bbox or region.solidity < 0.9)


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
