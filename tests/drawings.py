"""Pictures of digits as people make them: strokes of a hand, drawn with pens on papers, photographed in some light."""

from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage
from scipy.interpolate import CubicSpline

__all__ = ["KINDS", "draw"]

Grey = NDArray[Any]
RNG = np.random.Generator

# Ways to write each digit: strokes through points x,y in hundredths of a box; a point that stands twice is a corner.
HANDS = {
    0: [["50,0 15,20 10,60 35,100 75,85 85,40 50,0"],
        ["60,2 20,25 20,75 50,100 80,70 78,25 50,3"]],
    1: [["50,0 50,50 50,100"],
        ["55,0 50,50 42,100"],
        ["32,22 43,12 55,0 55,0 54,50 53,100"]],
    2: [["15,25 40,0 80,20 55,60 10,100 10,100 50,98 90,98"],
        ["20,20 50,2 75,25 50,70 20,95 15,80 45,85 90,95"]],
    3: [["20,10 55,0 80,20 45,45 45,45 85,70 55,100 15,90"],
        ["20,0 50,0 80,0 80,0 45,40 45,40 85,65 60,98 15,90"]],
    4: [["25,0 20,30 15,55 15,55 50,55 90,50", "70,15 66,60 62,100"],
        ["65,0 35,35 5,68 5,68 50,68 92,66", "65,0 65,50 65,100"]],
    5: [["25,5 22,25 20,42 20,42 60,40 82,68 50,100 10,90", "25,5 55,3 85,0"],
        ["80,0 50,2 28,4 28,4 22,42 22,42 65,42 78,75 45,100 12,92"]],
    6: [["70,0 35,30 20,70 45,100 78,80 55,52 24,72"],
        ["55,0 25,40 22,80 55,100 75,75 50,58 25,78"]],
    7: [["10,5 50,3 88,0 88,0 60,50 42,100"],
        ["12,2 50,2 85,2 85,2 62,45 40,100", "35,50 55,49 80,48"]],
    8: [["75,12 45,0 22,22 50,46 80,76 50,100 18,78 50,47 78,22 72,10"],
        ["50,0 25,22 50,45 75,22 50,0", "50,45 18,74 50,100 82,74 50,45"]],
    9: [["78,20 50,0 20,25 45,50 78,22 78,22 75,60 68,100"],
        ["75,15 45,2 22,28 48,50 76,20 76,20 72,70 30,100"]],
}  # fmt: skip


def draw(digit: int, kind: str, rng: RNG) -> Image.Image:
    """A picture of one digit; the generator decides about hand, pen, place and noise."""
    return KINDS[kind](digit, rng)


def _written(digit: int, rng: RNG, *, side: int, thickness: float, pressure: float = 0.1) -> Grey:
    """Ink of a digit, 0 to 1, in a box whose side is `side` pixels; the pen's width is a share of it."""
    hand = HANDS[digit][rng.integers(len(HANDS[digit]))]
    angle, slant = rng.normal(0, 0.06), rng.normal(-0.1, 0.15)
    width = rng.uniform(0.6, 0.95)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shape = turn @ np.array([[width, slant], [0, 1]])
    scale = 2  # drawn larger, for smooth edges
    picture = Image.new("L", (scale * side, scale * side))
    pen = ImageDraw.Draw(picture)
    for stroke in hand:
        for x, y, pressed in _path(stroke, rng):
            place = 0.5 + 0.72 * (shape @ (np.array([x, y]) - 0.5))
            place = np.clip(place, 0.07, 1 - 0.07) * scale * side
            radius = max(0.5 * thickness * scale * side * (1 + pressure * pressed), 0.6)
            pen.ellipse([*(place - radius), *(place + radius)], fill=255)
    return np.asarray(picture.resize((side, side), Image.Resampling.BOX), float) / 255


def _path(stroke: str, rng: RNG) -> Grey:
    """Points (x, y, pressure) along a stroke as an unsteady hand draws it."""
    points = stroke.split()
    shaky = {point: np.array(point.split(","), float) / 100 + rng.normal(0, 0.02, 2) for point in points}
    corners = [place for place in range(1, len(points)) if points[place] == points[place - 1]]
    parts = np.split(np.array([shaky[point] for point in points]), corners)
    path = np.concatenate([_spline(part) for part in parts if len(part) > 1])
    pressure = np.cumsum(rng.normal(0, 0.15, len(path)))
    pressure = np.clip(ndimage.gaussian_filter1d(pressure, 20), -2, 2)
    return np.column_stack([path, pressure])


def _spline(points: Grey) -> Grey:
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1) + 1e-6)])
    return np.asarray(CubicSpline(length, points, bc_type="natural")(np.linspace(0, length[-1], 300)))


def _placed(ink: Grey, height: int, width: int, rng: RNG) -> Grey:
    """The ink somewhere on a larger sheet."""
    sheet = np.zeros((height, width))
    top, left = rng.integers(0, height - len(ink) + 1), rng.integers(0, width - len(ink) + 1)
    sheet[top : top + len(ink), left : left + len(ink)] = ink
    return sheet


def _light(height: int, width: int, rng: RNG, strength: float) -> Grey:
    """Brightness, 1 at most, that falls off towards one side."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    slope = (np.cos(angle) * x + np.sin(angle) * y + 1.5) / 3
    return np.asarray(1 - strength * np.clip(slope, 0, 1))


def _shot(grey: Grey, rng: RNG, *, noise: float = 0.02, blur: float = 0.8) -> Grey:
    """What a camera makes of it."""
    grey = ndimage.gaussian_filter(grey, blur) + rng.normal(0, noise, grey.shape)
    return np.asarray(np.clip(grey, 0, 1))


def _image(grey: Grey) -> Image.Image:
    return Image.fromarray((np.clip(grey, 0, 1) * 255).astype(np.uint8))


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = BytesIO()
    image.save(file, "jpeg", quality=quality)
    return Image.open(file)


def _sheet(
    digit: int,
    rng: RNG,
    *,
    pen: tuple[float, float],
    ink: tuple[float, float],
    light: float = 0.2,
    ruling: Callable[[int, int, int], Grey] | None = None,
) -> Grey:
    """A photographed sheet: pen widths as shares of the digit's box, ink's darkness below that of the paper."""
    side = int(rng.integers(90, 320))
    height, width = (int(side * factor) for factor in rng.uniform(1.05, 2.2, 2))
    written = _placed(_written(digit, rng, side=side, thickness=rng.uniform(*pen)), height, width, rng)
    paper = np.full((height, width), rng.uniform(0.75, 0.97))
    if ruling is not None:
        paper = paper - ruling(height, width, side)
    sheet = paper - written * np.minimum(rng.uniform(*ink), paper)
    return _shot(sheet * _light(height, width, rng, light), rng, blur=side / 250)


def ballpoint(digit: int, rng: RNG) -> Image.Image:
    """A thin blue line on white paper."""
    grey = _sheet(digit, rng, pen=(0.02, 0.035), ink=(0.4, 0.7))
    blue = np.stack([grey, grey, np.sqrt(grey)], axis=2)
    return _jpeg(Image.fromarray((blue * 255).astype(np.uint8)), 85)


def pencil(digit: int, rng: RNG) -> Image.Image:
    """Thin, light grey, with the paper's grain."""
    grey = _sheet(digit, rng, pen=(0.02, 0.045), ink=(0.2, 0.35), light=0.1)
    grain = ndimage.gaussian_filter(rng.normal(0, 1, grey.shape), 1.0)
    return _image(grey + 0.02 * grain)


def marker(digit: int, rng: RNG) -> Image.Image:
    """A thick black line."""
    return _image(_sheet(digit, rng, pen=(0.08, 0.13), ink=(0.7, 0.95)))


def brush(digit: int, rng: RNG) -> Image.Image:
    """A very thick line of changing width."""
    side = int(rng.integers(150, 400))
    written = _written(digit, rng, side=side, thickness=rng.uniform(0.12, 0.17), pressure=0.25)
    return _image(_shot(0.95 - 0.85 * written, rng))


def ruled(digit: int, rng: RNG) -> Image.Image:
    """On lined paper."""

    def lines(height: int, width: int, side: int) -> Grey:
        gap, thickness = int(side * rng.uniform(0.3, 1.0)), max(1, side // 90)
        rows = (np.arange(height) + rng.integers(gap)) % gap < thickness
        return rng.uniform(0.15, 0.35) * np.repeat(rows[:, None], width, axis=1)

    return _image(_sheet(digit, rng, pen=(0.03, 0.06), ink=(0.5, 0.8), ruling=lines))


def squared(digit: int, rng: RNG) -> Image.Image:
    """On squared paper, whose lines are fainter."""

    def lines(height: int, width: int, side: int) -> Grey:
        gap, thickness = int(side * rng.uniform(0.18, 0.4)), max(1, side // 110)
        rows, columns = (np.arange(size) % gap < thickness for size in (height, width))
        return rng.uniform(0.08, 0.2) * (rows[:, None] | columns[None, :])

    return _image(_sheet(digit, rng, pen=(0.035, 0.06), ink=(0.5, 0.8), ruling=lines))


def shadow(digit: int, rng: RNG) -> Image.Image:
    """Strongly uneven light with the soft edge of a shadow across the sheet."""
    grey = np.asarray(_sheet(digit, rng, pen=(0.03, 0.08), ink=(0.5, 0.8), light=0.6))
    height, width = grey.shape
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    edge = np.cos(angle := rng.uniform(0, 6.3)) * x + np.sin(angle) * y - rng.uniform(-0.3, 0.3)
    return _image(grey * (0.72 + 0.28 / (1 + np.exp(-12 * edge))))


def blackboard(digit: int, rng: RNG) -> Image.Image:
    """Chalk: bright on dark green, with gaps."""
    side = int(rng.integers(120, 350))
    height, width = (int(side * factor) for factor in rng.uniform(1.1, 1.8, 2))
    written = _placed(_written(digit, rng, side=side, thickness=rng.uniform(0.04, 0.08)), height, width, rng)
    written = written * (ndimage.gaussian_filter(rng.normal(0, 1, written.shape), 1) > -0.35)
    grey = _shot(rng.uniform(0.12, 0.3) + 0.6 * written, rng, noise=0.03)
    green = np.stack([0.8 * grey, grey, 0.85 * grey], axis=2)
    return _jpeg(Image.fromarray((np.clip(green, 0, 1) * 255).astype(np.uint8)), 75)


def painted(digit: int, rng: RNG) -> Image.Image:
    """Drawn with a mouse: pure black on pure white, in any colour mode."""
    side = int(rng.integers(64, 600))
    written = _written(digit, rng, side=side, thickness=rng.uniform(0.02, 0.1), pressure=0.0)
    return _image(1 - (written > 0.5)).convert(str(rng.choice(["L", "RGB", "P", "1"])))


def transparent(digit: int, rng: RNG) -> Image.Image:
    """Drawn on no paper at all: black, or white, wherever it is not transparent."""
    written = _written(digit, rng, side=int(rng.integers(80, 400)), thickness=rng.uniform(0.04, 0.09))
    ink = np.zeros((*written.shape, 4))
    ink[..., 3] = written
    ink[..., :3] = rng.choice([0.0, 1.0])
    return Image.fromarray((ink * 255).astype(np.uint8))


def scan(digit: int, rng: RNG) -> Image.Image:
    """Sixteen bits of grey, of which only a few are used."""
    grey = _sheet(digit, rng, pen=(0.03, 0.06), ink=(0.5, 0.8), light=0.0)
    return Image.fromarray((grey * rng.integers(3000, 65000)).astype(np.uint16))


def desk(digit: int, rng: RNG) -> Image.Image:
    """A sheet on a dark desk that is seen on one or two sides of the photograph."""
    grey = _sheet(digit, rng, pen=(0.03, 0.07), ink=(0.5, 0.8))
    shares = rng.uniform(0.05, 0.16, 2) * rng.permutation([1, int(rng.integers(2))])
    bands = [int(len(grey) * share) for share in shares]
    framed = np.pad(grey, ((0, bands[0]), (bands[1], 0)), constant_values=rng.uniform(0.1, 0.3))
    return _image(_shot(framed, rng, blur=1.0))


def turned(digit: int, rng: RNG) -> Image.Image:
    """Taken with a camera on its side, which says so."""
    image = _image(_sheet(digit, rng, pen=(0.03, 0.08), ink=(0.5, 0.8)))
    turns = Image.Transpose
    rotation, tag = [(turns.ROTATE_90, 6), (turns.ROTATE_180, 3), (turns.ROTATE_270, 8)][rng.integers(3)]
    exif = Image.Exif()
    exif[0x0112] = tag
    file = BytesIO()
    image.transpose(rotation).save(file, "jpeg", exif=exif, quality=90)
    return Image.open(file)


def large(digit: int, rng: RNG) -> Image.Image:
    """A whole page from a telephone, the digit small on it."""
    side = int(rng.integers(350, 700))
    written = _placed(_written(digit, rng, side=side, thickness=rng.uniform(0.03, 0.06)), 2000, 1500, rng)
    sheet = _shot((0.9 - 0.7 * written) * _light(2000, 1500, rng, 0.4), rng, noise=0.03, blur=1.5)
    return _jpeg(_image(sheet), 80)


def tiny(digit: int, rng: RNG) -> Image.Image:
    """A thumbnail."""
    side = int(rng.integers(24, 48))
    written = _written(digit, rng, side=8 * side, thickness=rng.uniform(0.05, 0.09))
    return _image(0.95 - 0.8 * written).resize((side, side), Image.Resampling.LANCZOS)


def creased(digit: int, rng: RNG) -> Image.Image:
    """Paper with folds and stains, out of focus."""
    grey = _sheet(digit, rng, pen=(0.04, 0.08), ink=(0.5, 0.8), light=0.3)
    stains = ndimage.zoom(rng.normal(0, 1, (6, 6)), [(size + 6) / 6 for size in grey.shape], order=3)
    grey = grey + 0.04 * stains[: grey.shape[0], : grey.shape[1]]
    return _image(grey).filter(ImageFilter.GaussianBlur(len(grey) / 180))


def whiteboard(digit: int, rng: RNG) -> Image.Image:
    """A coloured marker on a board that shines where the lamp is."""
    grey = np.asarray(_sheet(digit, rng, pen=(0.03, 0.06), ink=(0.5, 0.8), light=0.3))
    height, width = grey.shape
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    glare = 0.5 * np.exp(-30 * ((x - rng.uniform()) ** 2 + (y - rng.uniform()) ** 2))
    colors = 1 - (1 - grey[..., None]) * np.array([[1, 1, 0.4], [0.5, 1, 1], [1, 0.6, 1]])[rng.integers(3)]
    return _jpeg(Image.fromarray((np.clip(colors + glare[..., None], 0, 1) * 255).astype(np.uint8)), 80)


def cardboard(digit: int, rng: RNG) -> Image.Image:
    """Brown and fibrous."""
    grey = np.asarray(_sheet(digit, rng, pen=(0.04, 0.08), ink=(0.6, 0.8), light=0.15)) * 0.65
    fibres = ndimage.gaussian_filter(rng.normal(0, 1, grey.shape), (0.7, 5))
    brown = (grey + 0.04 * fibres)[..., None] * np.array([1.0, 0.8, 0.6])
    return Image.fromarray((np.clip(brown, 0, 1) * 255).astype(np.uint8))


def margin(digit: int, rng: RNG) -> Image.Image:
    """Lined paper with a line down its margin."""

    def lines(height: int, width: int, side: int) -> Grey:
        gap, thickness = int(side * rng.uniform(0.35, 0.7)), max(1, side // 90)
        rows = (np.arange(height) + rng.integers(gap)) % gap < thickness
        columns = abs(np.arange(width) - int(width * rng.uniform(0.05, 0.2))) <= thickness
        return 0.25 * (rows[:, None] | columns[None, :])

    return _image(_sheet(digit, rng, pen=(0.03, 0.05), ink=(0.5, 0.8), ruling=lines))


def slanted(digit: int, rng: RNG) -> Image.Image:
    """Photographed from the side: what is far is narrow."""
    image = _image(_sheet(digit, rng, pen=(0.03, 0.07), ink=(0.5, 0.8)))
    width, height = image.size
    corners = np.array([[0, 0], [0, 1], [1, 1], [1, 0]]) + rng.uniform(-0.1, 0.1, (4, 2))
    place = tuple((corners * [width, height]).ravel())
    return image.transform(image.size, Image.Transform.QUAD, place, Image.Resampling.BICUBIC, fillcolor=60)


def shaken(digit: int, rng: RNG) -> Image.Image:
    """The camera moved."""
    grey = np.asarray(_sheet(digit, rng, pen=(0.04, 0.08), ink=(0.5, 0.8)))
    length = max(2, len(grey) // 60)
    return _image(ndimage.uniform_filter1d(grey, length, axis=int(rng.integers(2))))


def neighbours(digit: int, rng: RNG) -> Image.Image:
    """Cut out of a row of digits, of which the next ones can be seen in part."""
    side, pen = int(rng.integers(120, 300)), rng.uniform(0.04, 0.07)
    digits = (int(rng.integers(10)), digit, int(rng.integers(10)))
    sheet = np.concatenate([_written(number, rng, side=side, thickness=pen) for number in digits], axis=1)
    start = int(side * rng.uniform(0.75, 0.85))
    cut = sheet[:, start : start + int(1.4 * side)]
    return _image(_shot(0.93 - 0.75 * cut, rng))


KINDS: dict[str, Callable[[int, RNG], Image.Image]] = {
    function.__name__: function
    for function in (
        ballpoint, pencil, marker, brush, ruled, squared, shadow, blackboard, painted, transparent, scan, desk, turned,
        large, tiny, creased, whiteboard, cardboard, margin, slanted, shaken, neighbours,
    )
}  # fmt: skip
