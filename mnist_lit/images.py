"""Any picture of a single digit, brought into MNIST's form the way MNIST itself was made."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy import ndimage

__all__ = ["digit_in"]

Grey = NDArray[np.float32]
Mask = NDArray[np.bool_]

SIDE = 28
BOX = 20
LONGER = 280  # pixels of the longer side while ink is told from paper
STROKE = 0.125  # of the longer side of the digit: what is usual in MNIST


def grey_of(image: Image.Image) -> Grey:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float32)
        low, high = values.min(), values.max()
        return (values - low) / max(high - low, 1e-6)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("L"), dtype=np.float32) / 255


def resized(grey: Grey, longer: int) -> Grey:
    height, width = grey.shape
    scale = longer / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC))


def ink_of(grey: Grey) -> Grey:
    """How far each pixel is from the paper, towards the ink's side."""
    small = resized(grey, 56)
    # Paper is what most of a wide neighbourhood is made of.
    paper = ndimage.median_filter(small, size=35, mode="nearest")
    paper = ndimage.gaussian_filter(paper, 4)
    paper = np.asarray(Image.fromarray(paper).resize(grey.shape[::-1], Image.Resampling.BICUBIC))
    difference = grey - paper
    sign = -1 if (difference**3).sum() < 0 else 1
    return np.maximum(sign * difference, 0)


def otsu(values: Grey) -> float:
    counts, edges = np.histogram(values, bins=128)
    centres = (edges[:-1] + edges[1:]) / 2
    below = counts.cumsum()
    above = below[-1] - below
    sums = (counts * centres).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(centres[np.nanargmax(between[:-1])])


def without_lines(mask: Mask) -> Mask:
    """The mask without lines that run from edge to edge: those of ruled and squared paper."""
    for axis in (0, 1):
        lines = _lines(mask if axis else mask.T)
        lines = lines if axis else lines.T
        if lines.any():
            kept = mask & ~lines
            # Where ink crosses a line it goes on beyond it.
            bridge = np.zeros((9, 9), bool)
            if axis:
                bridge[:, 3:6] = True
            else:
                bridge[3:6] = True
            mask = kept | (ndimage.binary_closing(kept, bridge) & lines)
    return mask


def _lines(mask: Mask) -> Mask:
    width = mask.shape[1]
    thick = ndimage.binary_dilation(mask, np.ones((3, 1)))
    runs = ndimage.binary_opening(thick, np.ones((1, max(5, width // 4))))
    labels, num = ndimage.label(runs, np.ones((3, 3)))
    lines = np.zeros_like(mask)
    for label, place in enumerate(ndimage.find_objects(labels), start=1):
        height, length = (part.stop - part.start for part in place)
        if length > 0.85 * width and height < 0.12 * mask.shape[0]:
            lines[place] |= labels[place] == label
    return lines & mask


def digit_of(mask: Mask) -> Mask | None:
    """The largest plausible piece of ink, with the pieces near it."""
    labels, num = ndimage.label(mask, np.ones((3, 3)))
    if not num:
        return None
    places = ndimage.find_objects(labels)
    areas = ndimage.sum_labels(mask, labels, range(1, num + 1))
    height, width = mask.shape

    def score(index):
        rows, columns = places[index]
        touching = sum((rows.start == 0, columns.start == 0, rows.stop == height, columns.stop == width))
        y, x = (rows.start + rows.stop) / 2 / height - 0.5, (columns.start + columns.stop) / 2 / width - 0.5
        return areas[index] * (1 - abs(y)) * (1 - abs(x)) * 0.25**touching

    main = max(range(num), key=score)
    rows, columns = places[main]
    side = max(rows.stop - rows.start, columns.stop - columns.start)
    near = ndimage.distance_transform_edt(labels != main + 1) <= 0.15 * side
    chosen = [main + 1]
    for index in range(num):
        if index != main and areas[index] >= 0.04 * areas[main] and (near & (labels == index + 1)).any():
            chosen.append(index + 1)
    return np.isin(labels, chosen)


def with_stroke(mask: Mask, target: float) -> Mask:
    """The same strokes with another width, in pixels."""
    inside = ndimage.distance_transform_edt(mask)
    width = 4 * inside[mask].mean() - 1
    if width < 0.8 * target:
        return ndimage.distance_transform_edt(~mask) <= (0.9 * target - width) / 2
    if width > 1.35 * target:
        return inside > (width - 1.2 * target) / 2
    return mask


def mnist_form(grey: Grey) -> NDArray[np.uint8] | None:
    grey = resized(grey, LONGER)
    ink = ndimage.gaussian_filter(ink_of(grey), 0.7)
    threshold = otsu(ink)
    mask = ink > threshold
    if not mask.any() or mask.mean() > 0.6:
        return None
    contrast = ink[mask].mean() - ink[~mask].mean()
    if contrast < 0.05 or contrast < 4 * ink[~mask].std():
        return None
    mask = digit_of(without_lines(mask))
    if mask is None or mask.sum() < 30:
        return None
    rows, columns = ndimage.find_objects(mask.astype(int))[0]
    crop = np.pad(mask[rows, columns], 40)
    side = max(rows.stop - rows.start, columns.stop - columns.start)
    crop = with_stroke(crop, STROKE * side)
    rows, columns = ndimage.find_objects(crop.astype(int))[0]
    crop = crop[rows, columns]
    height, width = crop.shape
    scale = BOX / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = np.asarray(Image.fromarray(crop.astype(np.float32)).resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR))
    small = np.clip(small * 1.15, 0, 1)
    y, x = ndimage.center_of_mass(small)
    canvas = np.zeros((SIDE, SIDE), np.float32)
    top = int(np.clip(round(13.5 + 0.5 - y - 0.5), 0, SIDE - small.shape[0]))
    left = int(np.clip(round(13.5 + 0.5 - x - 0.5), 0, SIDE - small.shape[1]))
    canvas[top : top + small.shape[0], left : left + small.shape[1]] = small
    return (canvas * 255).round().astype(np.uint8)


def digit_in(image: Image.Image) -> NDArray[np.uint8] | None:
    """The digit in an image, in MNIST's form (28, 28), bright on black; None where there is no ink."""
    return mnist_form(grey_of(image))
