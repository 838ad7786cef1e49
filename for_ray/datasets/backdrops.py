"""What objects stand on: painted backgrounds with gradients, textures and clutter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from for_ray.datasets.scenes import Colour

# How captions end -> the background's two colours (top, bottom).
MOODS: dict[str, tuple[Colour, Colour]] = {
    "at night": ((14, 18, 48), (40, 44, 84)),
    "at sunset": ((250, 150, 90), (120, 70, 120)),
    "in the snow": ((214, 226, 238), (244, 247, 250)),
    "in the grass": ((170, 212, 150), (84, 140, 70)),
    "in the desert": ((238, 214, 164), (206, 160, 104)),
    "by the sea": ((164, 214, 240), (50, 120, 170)),
    "in the street": ((176, 180, 188), (104, 108, 116)),
    "in a room": ((238, 226, 206), (186, 152, 118)),
}


def background(rng: np.random.Generator, width: int, height: int, mood: str | None = None) -> Image.Image:
    """Paint a background: a gradient, one texture, and clutter that names nothing.

    Args:
        rng: Where everything but the mood comes from.
        width: In pixels.
        height: In pixels.
        mood: One of `MOODS`; two random colours when it is left out.
    """
    if mood is None:
        first, second = (_any_colour(rng) for _ in range(2))
    else:
        first, second = ((_stray(rng, colour)) for colour in MOODS[mood])
    pixels = _slope(rng, width, height, first, second)
    texture = TEXTURES[int(rng.integers(len(TEXTURES)))]
    pixels += float(rng.uniform(8, 30)) * texture(rng, width, height)[..., None]
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    _clutter(rng, image)
    return image


def _any_colour(rng: np.random.Generator) -> Colour:
    """A muted colour of any lightness."""
    base = int(rng.integers(30, 235))
    red, green, blue = (int(np.clip(base + rng.normal() * 35, 0, 255)) for _ in range(3))
    return red, green, blue


def _stray(rng: np.random.Generator, colour: Colour) -> Colour:
    """A colour near the given one."""
    red, green, blue = (int(np.clip(level + rng.normal() * 12, 0, 255)) for level in colour)
    return red, green, blue


def _slope(rng: np.random.Generator, width: int, height: int, first: Colour, second: Colour) -> np.ndarray:
    """A linear gradient [height, width, 3], float32, mostly downwards."""
    angle = rng.normal() * 0.6
    across = np.linspace(0, 1, width, dtype=np.float32)[None, :] * math.sin(angle)
    down = np.linspace(0, 1, height, dtype=np.float32)[:, None] * math.cos(angle)
    weight = np.clip(across + down, 0, 1)[..., None]
    slope: np.ndarray = np.array(first, np.float32) * (1 - weight) + np.array(second, np.float32) * weight
    return slope


def _plain(rng: np.random.Generator, width: int, height: int) -> np.ndarray:  # noqa: ARG001  # as the others
    """No texture, [height, width] of 0."""
    return np.zeros((height, width), np.float32)


def _blotches(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Soft noise of a random coarseness, [height, width] around 0."""
    cells = int(rng.integers(3, 24))
    coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) * 0.7


def _stripes(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Parallel stripes at any angle, soft or hard, [height, width] in [-1, 1]."""
    angle, waves = rng.uniform(0, math.pi), rng.uniform(3, 26)
    x = np.arange(width, dtype=np.float32)[None, :] * (math.cos(angle) / width)
    y = np.arange(height, dtype=np.float32)[:, None] * (math.sin(angle) / height)
    wave = np.sin(2 * math.pi * waves * (x + y) + np.float32(rng.uniform(0, 6)))
    return wave if rng.random() < 0.5 else np.sign(wave)


def _tiles(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A chequered or dotted pattern, [height, width] in [-1, 1]."""
    size = float(rng.uniform(8, 40))
    x = np.sin(np.arange(width, dtype=np.float32) * (math.pi / size))[None, :]
    y = np.sin(np.arange(height, dtype=np.float32) * (math.pi / size))[:, None]
    pattern: np.ndarray = np.sign(x * y) if rng.random() < 0.5 else np.sign(x * x * y * y - 0.5)
    return pattern


def _bricks(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Courses of bricks with dark joints, [height, width] of 0 and -1."""
    tall, wide = int(rng.integers(10, 26)), int(rng.integers(20, 60))
    y, x = np.arange(height)[:, None], np.arange(width)[None, :]
    joints = (y % tall < 2) | ((x + (y // tall % 2) * (wide // 2)) % wide < 2)
    return -joints.astype(np.float32)


TEXTURES: Sequence[Callable[[np.random.Generator, int, int], np.ndarray]] = (
    _plain, _blotches, _blotches, _stripes, _tiles, _bricks,
)  # fmt: skip


def _clutter(rng: np.random.Generator, image: Image.Image) -> None:
    """Scatter strokes, discs, rings and shards, faint to plain, that stand for nothing."""
    draw = ImageDraw.Draw(image, "RGBA")
    width, height = image.size
    for _ in range(int(rng.integers(0, 14))):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        reach = float(rng.uniform(0.03, 0.22)) * width
        colour = (*_any_colour(rng), int(rng.integers(40, 190)))
        kind = int(rng.integers(4))
        if kind == 0:
            end = (x + rng.uniform(-reach, reach) * 2, y + rng.uniform(-reach, reach) * 2)
            draw.line((x, y, *end), fill=colour, width=int(rng.integers(1, 5)))
        elif kind == 1:
            draw.ellipse((x - reach / 2, y - reach / 2, x + reach / 2, y + reach / 2), fill=colour)
        elif kind == 2:
            start, end_degrees = rng.integers(0, 360, 2).tolist()
            ring = (x - reach, y - reach, x + reach, y + reach)
            draw.arc(ring, start, end_degrees, fill=colour, width=int(rng.integers(1, 5)))
        else:
            corners = rng.uniform(-reach, reach, (int(rng.integers(3, 6)), 2)) * 0.7 + (x, y)
            draw.polygon([(float(a), float(b)) for a, b in corners], fill=colour)
