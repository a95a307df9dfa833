"""Pictures in which the digit is surrounded, marked, or shown by other than ink on paper; see also `drawings`."""

from collections.abc import Callable
from io import BytesIO
from typing import Any

import matplotlib as mpl
import numpy as np
from drawings import RNG, Grey, _image, _light, _placed, _sheet, _shot, _written
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from scipy import ndimage

__all__ = ["SCENES"]

COLOR_MAPS = ["jet", "viridis", "plasma", "inferno", "magma", "cividis", "hot", "coolwarm", "turbo", "Blues", "rainbow"]


def _clean(digit: int, rng: RNG, side: int, pen: tuple[float, float] = (0.05, 0.1)) -> Grey:
    size = int(side * rng.uniform(1.0, 1.4))
    return _placed(_written(digit, rng, side=side, thickness=rng.uniform(*pen)), size, size, rng)


def _small(digit: int, rng: RNG, side: int) -> Image.Image:
    """An image like MNIST's: few pixels, bright on black."""
    return _image(_clean(digit, rng, 8 * side, pen=(0.08, 0.12))).resize((side, side), Image.Resampling.BOX)


def _zoomed(image: Image.Image, rng: RNG, *kernels: Image.Resampling) -> Grey:
    side = int(rng.integers(100, 600))
    zoomed = np.asarray(image.resize((side, side), kernels[rng.integers(len(kernels))]), float) / 255
    return zoomed if rng.integers(2) else 1 - zoomed


def enlarged(digit: int, rng: RNG) -> Image.Image:
    """A thumbnail, a digital zoom."""
    image = _small(digit, rng, int(rng.integers(28, 64)))
    return _image(_zoomed(image, rng, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS))


def pixelated(digit: int, rng: RNG) -> Image.Image:
    """A screenshot of an image of 28x28."""
    return _image(_zoomed(_small(digit, rng, 28), rng, Image.Resampling.NEAREST))


def unfocused(digit: int, rng: RNG) -> Image.Image:
    ink = _clean(digit, rng, int(rng.integers(200, 400)))
    return _image(_shot(0.95 - 0.85 * ink, rng, noise=rng.uniform(0, 0.02), blur=len(ink) * rng.uniform(0.008, 0.022)))


def _surrounded(sheet: Grey, rng: RNG, brightness: float) -> Grey:
    """The sheet, turned a little, on a larger area."""
    side, angle = int(max(sheet.shape) / rng.uniform(0.35, 0.75)), rng.uniform(-8, 8)
    turned = Image.fromarray(sheet.astype(np.float32)).rotate(angle, Image.Resampling.BICUBIC, expand=True)
    mask = Image.new("L", sheet.shape[::-1], 255).rotate(angle, expand=True)
    area = Image.new("F", (side, side), brightness)
    top, left = (int(max(1, side - size) * rng.uniform(0.2, 0.8)) for size in turned.size)
    area.paste(turned, (top, left), mask)
    return _shot(np.asarray(area), rng)


def note(digit: int, rng: RNG) -> Image.Image:
    """A sheet on a dark table."""
    return _image(_surrounded(_sheet(digit, rng, pen=(0.04, 0.08), ink=(0.5, 0.8)), rng, rng.uniform(0.05, 0.3)))


def screen(digit: int, rng: RNG) -> Image.Image:
    """A dark telephone in a bright room."""
    ink = _clean(digit, rng, int(rng.integers(150, 300)))
    ink = np.pad(ink, ((int(len(ink) * rng.uniform(0, 0.4)),) * 2, (0, 0)))
    room = _surrounded(0.08 + 0.8 * ink, rng, rng.uniform(0.7, 0.95))
    return _image(room * _light(room.shape[0], room.shape[1], rng, 0.3))


def white_margin(digit: int, rng: RNG) -> Image.Image:
    """An image like MNIST's, saved within a white margin."""
    image = _small(digit, rng, 28).resize((side := int(rng.integers(28, 400)),) * 2)
    margin = int(side * rng.uniform(0.05, 0.5)) + 1
    return _image(np.pad(np.asarray(image, float) / 255, margin, constant_values=1))


def colormap(digit: int, rng: RNG) -> Image.Image:
    values = _zoomed(_small(digit, rng, 28), rng, Image.Resampling.BICUBIC, Image.Resampling.NEAREST)
    return Image.fromarray(mpl.colormaps[str(rng.choice(COLOR_MAPS))](np.clip(values, 0, 1), bytes=True)[..., :3])


def figure(digit: int, rng: RNG) -> Image.Image:
    """Saved from a notebook, with axes."""
    figure, file = Figure(figsize=(rng.uniform(3, 6.4), rng.uniform(3, 4.8)), dpi=80), BytesIO()
    axes = figure.subplots()
    axes.imshow(_small(digit, rng, 28), cmap=str(rng.choice(["gray", "gray_r", "viridis", "magma"])))
    if rng.integers(2):
        axes.set_title(f"label {digit}")
    figure.savefig(file, format="png")
    return Image.open(file)


def _marked(digit: int, rng: RNG, shape: str, half: float, top: float, bottom: float) -> Image.Image:
    """A digit with a line, circle or box, given as shares of the image."""
    side, pen = int(rng.integers(120, 300)), rng.uniform(0.04, 0.09)
    image = _image(np.pad(_written(digit, rng, side=side, thickness=pen), int(side * 0.35)))
    size, options = image.width, {"width": max(2, int(side * pen * rng.uniform(0.5, 1)))}
    box = [size * (0.5 - half), size * top, size * (0.5 + half), size * bottom]
    options["fill" if shape == "line" else "outline"] = 255
    getattr(ImageDraw.Draw(image), shape)(box, **options)
    return _image(_shot(0.93 - rng.uniform(0.5, 0.85) * np.asarray(image) / 255, rng))


def circled(digit: int, rng: RNG) -> Image.Image:
    radius = rng.uniform(0.39, 0.48)
    return _marked(digit, rng, "ellipse", radius * rng.uniform(0.9, 1), 0.5 - radius, 0.5 + radius)


def boxed(digit: int, rng: RNG) -> Image.Image:
    return _marked(digit, rng, "rectangle", half := rng.uniform(0.34, 0.47), 0.5 - half, 0.5 + half)


def underlined(digit: int, rng: RNG) -> Image.Image:
    half, y = rng.uniform(0.2, 0.45), rng.uniform(0.8, 0.88)
    return _marked(digit, rng, "line", half, y, y + rng.uniform(-0.03, 0.03))


def hollow(digit: int, rng: RNG) -> Image.Image:
    """Only its outline is drawn."""
    ink = _clean(digit, rng, side := int(rng.integers(200, 400)), pen=(0.12, 0.16)) > 0.5
    outline = ink & ~ndimage.binary_erosion(ink, iterations=max(2, int(side * rng.uniform(0.008, 0.018))))
    return _image(_shot(0.95 - 0.8 * outline, rng))


def faint(digit: int, rng: RNG) -> Image.Image:
    ink, paper = _clean(digit, rng, int(rng.integers(100, 400))), rng.uniform(0.1, 0.95)
    contrast = rng.uniform(0.04, 0.12)
    return _image(_shot(paper + contrast * ink * (1 if paper < 0.5 else -1), rng, noise=contrast * rng.uniform(0, 0.1)))


def half_transparent(digit: int, rng: RNG) -> Image.Image:
    ink = _written(digit, rng, side=int(rng.integers(80, 400)), thickness=rng.uniform(0.04, 0.09))
    pixels = np.empty((*ink.shape, 4))
    pixels[..., :3] = rng.choice([0.0, 1.0]) if rng.integers(2) else rng.uniform(0, 1, 3)
    pixels[..., 3] = ink * rng.uniform(0.15, 0.6)
    return Image.fromarray((pixels * 255).astype(np.uint8))


def equal_lightness(digit: int, rng: RNG) -> Image.Image:
    """Ink and paper differ in their hue only."""
    paper = np.full(3, 0.5)
    colors = np.array([[0.4, -0.2, 0.0], [0.4, -0.16, -0.23], [0.1, 0.05, -0.52], [0, 0.1, -0.5]])
    color = colors[rng.integers(len(colors))] * rng.choice([-0.9, 0.9])
    pixels = paper + rng.uniform(-0.05, 0.05) + _clean(digit, rng, int(rng.integers(100, 400)))[..., None] * color
    return Image.fromarray((np.clip(pixels + rng.normal(0, 0.01, pixels.shape), 0, 1) * 255).astype(np.uint8))


def broken_pixel(digit: int, rng: RNG) -> Image.Image:
    """Sixteen bits, one of whose pixels is far from the others."""
    grey = _sheet(digit, rng, pen=(0.03, 0.08), ink=(0.5, 0.8), light=0.0)
    pixels = (grey * rng.integers(2000, 20000)).astype(np.uint16)
    pixels[tuple(rng.integers(pixels.shape))] = 65535
    return Image.fromarray(pixels)


SCENES: dict[str, Callable[[int, RNG], Any]] = {
    function.__name__: function
    for function in (
        enlarged, pixelated, unfocused, note, screen, white_margin, colormap, figure, circled, boxed, underlined,
        hollow, faint, half_transparent, equal_lightness, broken_pixel,
    )
}  # fmt: skip
