"""The picture book's pages: which objects stand in a scene, what of them can be seen, and captions for it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from for_ray.datasets.backdrops import MOODS, background
from for_ray.datasets.glyphs import Field, family_glyphs, field_of
from for_ray.datasets.scenes import COLOURS, Placement, SceneStyle, free_spot, paint, place
from for_ray.datasets.vocabulary import imagenet21k_lemmas

Split = Literal["train", "val"]

BASE = (
    "anchor", "baby carriage", "basketball", "bed", "bell", "bicycle", "binoculars", "bird", "bone",
    "book", "briefcase", "bug", "calculator", "camera", "car", "carrot", "church", "clock", "cloud",
    "compass", "crown", "dumbbell", "faucet", "ferry", "fish", "flag", "flashlight", "flower", "ghost",
    "hammer", "headset", "helicopter", "horse", "ice cream", "key", "keyboard", "lightbulb", "magnet",
    "microphone", "pencil", "piggy bank", "printer", "robot", "rocket", "star", "train", "truck",
    "wrench",
)  # fmt: skip
NOVEL = (
    "airplane", "bus", "cake", "cat", "dog", "fire extinguisher", "glasses", "knife", "laptop",
    "microscope", "pizza", "spider", "stethoscope", "tooth", "tractor", "umbrella", "wheelchair",
)  # fmt: skip
CATEGORIES = tuple(sorted(BASE + NOVEL))  # COCO's category id is the index here plus one

LOGOS = frozenset({"apple", "box"})  # trademarks, where other families draw the thing

STYLE = SceneStyle(
    sizes=(1 / 20, 1 / 2), tilt_degrees=8, shear=0.08, perspective=0.1, stroke=(-0.5, 1.5), overlap=0.35
)
FEWEST, MOST = 3, 9  # objects in a scene
ANNOTATED_SHARE = 0.65  # of the objects belong to a category
LEAST_VISIBLE = 0.3  # of an object's own pixels, or it is not annotated
LEAST_CONTRAST = 90  # between an object's colour and what it stands on, summed over red, green and blue
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
PLURALS = {"knife": "knives", "fish": "fish", "glasses": "pairs of glasses", "scissors": "pairs of scissors"}


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene as it can be seen.

    `box` is left, top, width, height of its visible pixels; `visible` the fraction of its pixels, those
    outside the image counted, that can be seen.
    """

    name: str
    colour: str
    box: tuple[int, int, int, int]
    area: int
    visible: float


@dataclass(frozen=True)
class Page:
    """A drawn scene with its objects, back to front, its mood if it has one, and its two captions."""

    image: Image.Image
    objects: tuple[SceneObject, ...]
    mood: str | None
    captions: tuple[str, str]


@functools.cache
def other_names() -> tuple[str, ...]:
    """The names that appear unannotated: all others but `LOGOS` and what ImageNet calls the same."""
    known = LOGOS | set(CATEGORIES)
    same = {lemma for lemmas in imagenet21k_lemmas() if known & set(lemmas) for lemma in lemmas}
    return tuple(name for name in family_glyphs("material") if name not in known and name not in same)


def draw_page(seed: int, split: Split, index: int) -> Page:
    """Draw one image of the data set; the same for the same arguments, on any machine.

    Raises:
        ConfigError: `qtawesome` is missing.
    """
    rng = np.random.default_rng([seed, ("train", "val").index(split), index])
    side = int(rng.integers(160, 321))
    size = (
        (side, side) if rng.random() < 0.6 else (side, int(rng.integers(max(160, side * 3 // 4), side + 1)))
    )
    width, height = size if rng.random() < 0.6 else size[::-1]
    mood = list(MOODS)[int(rng.integers(len(MOODS)))] if rng.random() < 0.5 else None
    canvas = background(rng, width, height, mood)
    objects = _draw_objects(rng, canvas)
    noise = rng.standard_normal((height, width, 1), dtype=np.float32) * float(rng.uniform(0, 8))
    image = Image.fromarray(np.clip(np.asarray(canvas) + noise, 0, 255).astype(np.uint8))
    return Page(image, objects, mood, (_caption(rng, objects, mood), _caption(rng, objects, mood)))


def _draw_objects(rng: np.random.Generator, canvas: Image.Image) -> tuple[SceneObject, ...]:
    """Put three to nine objects on the canvas."""
    width, height = canvas.size
    owner = np.full((height, width), -1, np.int16)
    drawn: list[tuple[str, str, float]] = []  # name, colour, pixels of its own
    for name, field, placement in _arrange(rng, width, height):
        repeated = bool(drawn) and drawn[-1][0] == name
        same_colour = repeated and rng.random() < 0.5
        colour = drawn[-1][1] if same_colour else _pick_colour(rng, canvas, placement)
        cover = np.asarray(paint(canvas, rng, field, placement, colour, STYLE.stroke)) > 127
        left, top = placement.corner
        cut_left, cut_top = max(0, -left), max(0, -top)
        seen = cover[cut_top : height - top, cut_left : width - left]
        region = owner[max(0, top) : max(0, top) + seen.shape[0], max(0, left) : max(0, left) + seen.shape[1]]
        region[seen] = len(drawn)
        drawn.append((name, colour, float(cover.sum())))
    return tuple(_as_seen(owner == index, *each) for index, each in enumerate(drawn))


def _arrange(rng: np.random.Generator, width: int, height: int) -> list[tuple[str, Field, Placement]]:
    """Choose three to nine objects and where they stand; begin again where only two found a place."""
    count = FEWEST + int((MOST + 1 - FEWEST) * rng.random() ** 1.5)  # five in the mean
    while True:
        arranged: list[tuple[str, Field, Placement]] = []
        for _ in range(count):
            name = arranged[-1][0] if arranged and rng.random() < 0.15 else _pick_name(rng)
            glyphs = family_glyphs("material")[name]
            field = field_of(glyphs[int(rng.integers(len(glyphs)))])
            others = [placement for _, _, placement in arranged]
            placement = _find_place(rng, field, others, (width, height), _pick_size(rng, count))
            if placement is not None:
                arranged.append((name, field, placement))
        if len(arranged) >= FEWEST:
            return arranged


def _find_place(rng: np.random.Generator, field: Field, others: Sequence[Placement], scene: tuple[int, int],
                size: float) -> Placement | None:  # fmt: skip
    """Place an object of the size, or a smaller one where there is no room; None where even that fails."""
    corners = [(*each.corner, each.width, each.height) for each in others]
    boxes = np.array([(x, y, x + w, y + h) for x, y, w, h in corners], float).reshape(-1, 4)
    for fraction in (1.0, 0.8, 0.6, 0.45, 0.3):
        placement = place(rng, field, min(scene), STYLE, size=max(STYLE.sizes[0], size * fraction))
        spot = free_spot(rng, boxes, placement, scene, STYLE.overlap)
        if spot is not None:
            return dataclasses.replace(placement, x=spot[0], y=spot[1])
    return None


def _pick_name(rng: np.random.Generator) -> str:
    names = CATEGORIES if rng.random() < ANNOTATED_SHARE else other_names()
    return names[int(rng.integers(len(names)))]


def _pick_size(rng: np.random.Generator, count: int) -> float:
    """An object's longer side as a fraction of the scene's shorter one; smaller where there are many."""
    low, high = STYLE.sizes[0], min(STYLE.sizes[1], 1.25 / count**0.5)
    return float(low * (high / low) ** rng.random() ** (1 / 3))  # rather large than small


def _pick_colour(rng: np.random.Generator, canvas: Image.Image, placement: Placement) -> str:
    """A colour's name, one that stands out from what the canvas shows there when three tries find one."""
    left, top = placement.corner
    box = (left, top, left + placement.width, top + placement.height)
    behind = np.asarray(canvas.crop(box).resize((1, 1), Image.Resampling.BOX))[0, 0]
    names = list(COLOURS)
    for _ in range(3):
        name = names[int(rng.integers(len(names)))]
        if np.abs(behind - np.array(_typical(name))).sum() >= LEAST_CONTRAST:
            break
    return name


@functools.cache
def _typical(colour_name: str) -> tuple[int, ...]:
    """The middle of a named colour, red, green, blue."""
    hue, saturation, value, _ = COLOURS[colour_name]
    pixel = Image.new("HSV", (1, 1), (round(hue / 360 * 255), round(saturation * 255), round(value * 255)))
    return tuple(np.asarray(pixel.convert("RGB"))[0, 0].tolist())


def _as_seen(mask: np.ndarray, name: str, colour: str, pixels: float) -> SceneObject:
    """Measure an object's visible pixels, bool [height, width]."""
    area = int(mask.sum())
    if not area:
        return SceneObject(name, colour, (0, 0, 0, 0), 0, 0.0)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
    return SceneObject(
        name, colour, (int(box[0]), int(box[1]), int(box[2]), int(box[3])), area, area / pixels
    )


def _caption(rng: np.random.Generator, objects: Sequence[SceneObject], mood: str | None) -> str:
    """Name one to four of the visible objects with colour and number, and the mood if there is one."""
    groups: dict[tuple[str, str], int] = {}
    for each in objects:
        if each.visible >= LEAST_VISIBLE:
            groups[each.colour, each.name] = groups.get((each.colour, each.name), 0) + 1
    if not groups:
        return f"nothing much {mood or 'here'}"
    keys = list(groups)
    chosen = [keys[int(k)] for k in rng.permutation(len(keys))[: 1 + int(rng.integers(4))]]
    phrases = [_phrase(groups[key], key[0] if rng.random() < 0.6 else "", key[1]) for key in chosen]
    text = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return f"{text} {mood}" if mood else text


def _phrase(count: int, colour: str, name: str) -> str:
    """`a red car`, `two dogs`, `an anchor`."""
    if count == 1:
        noun = f"{colour} {name}".strip()
        return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
    plural = PLURALS.get(name, name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s"))
    return " ".join(word for word in (NUMBERS.get(count, "many"), colour, plural) if word)
