"""Objects in a scene: where a glyph stands, how it is tilted and stretched, and how it is painted."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from for_ray.datasets.glyphs import FIELD_PIXELS, LEVELS_PER_PIXEL, Field

Colour = tuple[int, int, int]

# Name -> hue in degrees, saturation and value in [0, 1], and how far the hue may stray.
COLOURS: dict[str, tuple[float, float, float, float]] = {
    "red": (357, 0.85, 0.85, 7),
    "orange": (28, 0.90, 0.97, 6),
    "yellow": (52, 0.85, 0.97, 5),
    "green": (125, 0.70, 0.65, 22),
    "blue": (218, 0.80, 0.82, 14),
    "purple": (278, 0.65, 0.70, 12),
    "pink": (332, 0.45, 0.98, 8),
    "brown": (24, 0.65, 0.45, 6),
    "black": (0, 0.10, 0.10, 180),
    "white": (0, 0.03, 0.97, 180),
}


@dataclass(frozen=True)
class SceneStyle:
    """How wild the objects are drawn.

    `sizes` is the range of an object's longer side as a fraction of the scene's shorter side; `tilt_degrees`
    the standard deviation of the rotation; `shear` and `perspective` the largest of each; `stroke` the range
    that strokes grow by, in field pixels; `overlap` the largest fraction of a new object's box that may lie
    over earlier ones.
    """

    sizes: tuple[float, float]
    tilt_degrees: float
    shear: float
    perspective: float
    stroke: tuple[float, float]
    overlap: float


@dataclass(frozen=True)
class Placement:
    """Where an object stands: its middle and its box's size in pixels, and the map to the field."""

    x: float
    y: float
    width: int
    height: int
    to_field: tuple[float, float, float, float, float, float, float, float]
    field_pixels_per_pixel: float

    @property
    def corner(self) -> tuple[int, int]:
        """The box's left and top in the scene, pixels; may be negative."""
        return round(self.x - self.width / 2), round(self.y - self.height / 2)


def place(
    rng: np.random.Generator, field: Field, side: int, style: SceneStyle, *, size: float | None = None
) -> Placement:
    """Choose size, tilt, shear, perspective and flip of an object; it stands at (0, 0) until it is moved.

    Args:
        rng: Where the choices come from.
        field: The drawing.
        side: The scene's shorter side in pixels.
        style: How far each may go.
        size: The object's longer side as a fraction of `side`; drawn from the style when it is left out.
    """
    if size is None:
        low, high = style.sizes
        size = low * (high / low) ** rng.random()
    scale = max(field.extent) / (size * side)  # field pixels a scene pixel
    angle = math.radians(rng.normal() * style.tilt_degrees)
    shear, stretch = (
        rng.uniform(-style.shear, style.shear),
        math.exp(rng.uniform(-style.shear, style.shear) / 2),
    )
    cos, sin = math.cos(angle), math.sin(angle)
    flip = -1.0 if rng.random() < 0.5 else 1.0
    # Field from scene: rotate, shear, stretch, flip.
    forward = np.array([[cos, sin], [-sin, cos]]) @ np.array([[1.0, shear], [0.0, 1.0]])
    matrix = scale * np.diag([flip * stretch, 1 / stretch]) @ forward
    inverse = np.linalg.inv(matrix)
    half = np.array(field.extent) / 2 + 6.0
    width, height = (2 * np.abs(inverse) @ half).tolist()
    box = (
        max(4, math.ceil(width * (1 + style.perspective))),
        max(4, math.ceil(height * (1 + style.perspective))),
    )
    tip_x, tip_y = rng.uniform(-style.perspective, style.perspective, 2) / (np.array(box) / 2)
    return Placement(0.0, 0.0, box[0], box[1], _coefficients(matrix, box, float(tip_x), float(tip_y)), scale)


def free_spot(rng: np.random.Generator, boxes: np.ndarray, placement: Placement, scene: tuple[int, int],
              overlap: float) -> tuple[float, float] | None:  # fmt: skip
    """Find a place for an object among those that stand already; it may stick out of the scene a little.

    Args:
        rng: Where the tries come from.
        boxes: Theirs, [n, 4] as left, top, right, bottom in pixels; n may be 0.
        placement: The object's, for its width and height.
        scene: Width and height in pixels.
        overlap: The largest fraction of the smaller of two boxes that they may share.

    Returns:
        The middle, x and y in pixels; None when eight tries failed.
    """
    size = np.array([placement.width, placement.height])
    slack = np.array(scene) - size
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for _ in range(8):
        corner = np.where(slack > 0, rng.random(2) * (slack + 0.12 * size) - 0.06 * size, slack / 2)
        shared = np.minimum(boxes[:, 2:], corner + size) - np.maximum(boxes[:, :2], corner)
        if (shared.clip(0).prod(1) <= overlap * np.minimum(areas, size.prod())).all():
            x, y = (corner + size / 2).tolist()
            return x, y
    return None


def _coefficients(
    matrix: np.ndarray, box: tuple[int, int], tip_x: float, tip_y: float
) -> tuple[float, float, float, float, float, float, float, float]:
    """Pillow's eight perspective numbers of a map that takes the box's middle to the field's middle."""
    middle = FIELD_PIXELS / 2
    centred = np.array([[1.0, 0.0, -box[0] / 2], [0.0, 1.0, -box[1] / 2], [0.0, 0.0, 1.0]])
    full = np.array([
        [matrix[0, 0] + middle * tip_x, matrix[0, 1] + middle * tip_y, middle],
        [matrix[1, 0] + middle * tip_x, matrix[1, 1] + middle * tip_y, middle],
        [tip_x, tip_y, 1.0],
    ]) @ centred  # fmt: skip
    full /= full[2, 2]
    a, b, c, d, e, f, g, h, _ = full.reshape(9).tolist()
    return a, b, c, d, e, f, g, h


@dataclass(frozen=True)
class Ink:
    """An object's coverage within its placement's box: its strokes, and its silhouette with holes filled."""

    strokes: Image.Image
    body: Image.Image
    rim: Image.Image


def ink(field: Field, placement: Placement, grow: float, rim: float) -> Ink:
    """Turn distances into coverage, antialiased.

    Args:
        field: The drawing.
        placement: Where it stands.
        grow: How far strokes grow, in field pixels; negative thins them.
        rim: How far the outline around the silhouette reaches, in field pixels.
    """
    box = (placement.width, placement.height)
    edge, body = (
        image.transform(box, Image.Transform.PERSPECTIVE, placement.to_field, Image.Resampling.BILINEAR)
        for image in (field.edge, field.body)
    )
    slope = 1 / placement.field_pixels_per_pixel
    return Ink(
        _look_up(edge, _coverage(round(grow, 1), round(slope, 2))),
        _look_up(body, _coverage(round(grow, 1), round(slope, 2))),
        _look_up(body, _coverage(round(grow + rim, 1), round(slope, 2))),
    )


@functools.lru_cache(maxsize=65536)
def _coverage(grow: float, slope: float) -> np.ndarray:
    """Field value -> coverage 0-255: the outline moves out by `grow`; a field pixel is `slope` pixels."""
    distance: np.ndarray = (np.arange(256) - 128) / LEVELS_PER_PIXEL + grow
    return np.rint(np.clip(0.5 + distance * slope, 0, 1) * 255).astype(np.uint8)


def _look_up(image: Image.Image, table: np.ndarray) -> Image.Image:
    """Each grey level replaced by the table's; Pillow's own `point` checks the 256 entries every time."""
    return Image.fromarray(table[np.asarray(image)])


def shade(rng: np.random.Generator, colour_name: str, light: float = 1.0) -> Colour:
    """A random shade of a named colour; `light` above 1 lightens it, below 1 darkens it."""
    hue, saturation, value, stray = COLOURS[colour_name]
    hue = (hue + rng.uniform(-stray, stray)) % 360
    saturation = min(1.0, saturation * rng.uniform(0.85, 1.1))
    value = min(1.0, value * rng.uniform(0.88, 1.1))
    if light > 1:
        saturation, value = saturation / light, 1 - (1 - value) / light
    else:
        value *= light
    red, green, blue = (
        value - value * saturation * max(0.0, min(k, 4 - k, 1.0))
        for k in ((n + hue / 60) % 6 for n in (5, 3, 1))
    )
    return round(red * 255), round(green * 255), round(blue * 255)


def paint(canvas: Image.Image, rng: np.random.Generator, field: Field, placement: Placement,
          colour_name: str, stroke: tuple[float, float]) -> Image.Image:  # fmt: skip
    """Draw one object onto the canvas, in one of four manners, with or without rim and shadow.

    Args:
        canvas: An RGB image; changed.
        rng: Where shade, manner, rim and shadow come from.
        field: The drawing.
        placement: Where it stands.
        colour_name: One of `COLOURS`.
        stroke: The range that strokes grow by, in field pixels.

    Returns:
        What the object covers within its placement's box, greyscale 0-255, shadow left out.
    """
    rimmed = rng.random() < 0.35
    coverage = ink(
        field, placement, float(rng.uniform(*stroke)), float(rng.uniform(1.5, 4)) if rimmed else 0.0
    )
    corner = placement.corner
    main = shade(rng, colour_name)
    if rng.random() < 0.35:
        shadow = _look_up(coverage.body, _fraction(round(float(rng.uniform(0.25, 0.6)), 1)))
        shift = 1 + 0.04 * rng.random() * placement.width
        canvas.paste((10, 10, 16), (round(corner[0] + shift), round(corner[1] + shift)), shadow)
    if rimmed:
        canvas.paste((245, 245, 240) if rng.random() < 0.5 else (24, 22, 26), corner, coverage.rim)
    manner = rng.random()
    if manner < 0.25:  # tinted body under strokes of the colour
        canvas.paste(shade(rng, colour_name, float(rng.uniform(1.6, 2.6))), corner, coverage.body)
        canvas.paste(main, corner, coverage.strokes)
    elif manner < 0.45:
        _paint_body(canvas, rng, coverage, corner, main, colour_name)
    elif manner < 0.65:
        gradient = _gradient(main, shade(rng, colour_name, float(rng.uniform(0.55, 0.8))), placement, rng)
        canvas.paste(gradient, corner, coverage.strokes)
    else:
        canvas.paste(main, corner, coverage.strokes)
    return coverage.body if manner < 0.45 or rimmed else coverage.strokes


def _paint_body(canvas: Image.Image, rng: np.random.Generator, coverage: Ink, corner: tuple[int, int],
                main: Colour, colour_name: str) -> None:  # fmt: skip
    """A body of the colour under contrasting strokes; where strokes fill the body, the other way round."""
    dark = colour_name in ("black", "brown", "purple", "blue")
    other = (240, 238, 232) if dark and rng.random() < 0.6 else shade(rng, colour_name, 0.35)
    filled = _is_filled(coverage)
    canvas.paste(other if filled else main, corner, coverage.body)
    canvas.paste(main if filled else other, corner, coverage.strokes)


def _is_filled(coverage: Ink) -> bool:
    """Whether the strokes cover most of the silhouette, so that painting them hides the body's colour."""
    strokes, body = (float(np.asarray(image).mean()) for image in (coverage.strokes, coverage.body))
    return bool(strokes > 0.6 * body)


@functools.lru_cache(maxsize=16)
def _fraction(fraction: float) -> np.ndarray:
    """Every grey level times a fraction."""
    levels: np.ndarray = np.rint(np.arange(256) * fraction)
    return levels.astype(np.uint8)


def _gradient(first: Colour, second: Colour, placement: Placement, rng: np.random.Generator) -> Image.Image:
    """An image of the placement's size that goes from one colour to the other, down or across."""
    two = Image.new("RGB", (2, 2))
    two.putdata([first, first, second, second] if rng.random() < 0.6 else [first, second, first, second])
    return two.resize((placement.width, placement.height), Image.Resampling.BILINEAR)
