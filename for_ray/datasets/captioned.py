"""Captioned scenes to train the picture book's encoder with, from the families that the data set leaves out.

Captions are partial: they name one to four of the objects present. Scenes and captions also say what they
claim, so that a caption which happens to be true of another image can be told from one that is false.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from for_ray.datasets.backdrops import MOODS, background
from for_ray.datasets.glyphs import Family, Field, Glyph, family_glyphs, field_of
from for_ray.datasets.scenes import COLOURS, SceneStyle, free_spot, paint, place

TRAINING_FAMILIES: tuple[Family, ...] = ("awesome", "phosphor", "remix")
NUMBERS = {2: "two", 3: "three", 4: "four"}
NAMED_SHARES = (0.6, 0.22, 0.12, 0.06)  # how often a caption names one, two, three, four objects
BACKDROP_PIXELS = 256

Objects = tuple[tuple[int, int], ...]  # (index of the name, index of the colour) of each object


@dataclass(frozen=True)
class SceneKind:
    """Scenes of one size: their side in pixels, the least and the most objects, how these are drawn."""

    pixels: int
    objects: tuple[int, int]
    style: SceneStyle


_EASY = SceneStyle((0.5, 0.95), 7, 0.08, 0.1, (-0.5, 1), 0.5)
_WILD = SceneStyle((0.3, 0.9), 16, 0.18, 0.25, (-1.5, 3), 0.5)
KINDS = {
    "easy": SceneKind(64, (1, 1), _EASY),
    "small": SceneKind(64, (1, 2), _WILD),
    "medium": SceneKind(128, (1, 5), dataclasses.replace(_WILD, sizes=(0.1, 0.65))),
    "large": SceneKind(192, (1, 8), dataclasses.replace(_WILD, sizes=(0.07, 0.7))),
}


@dataclass(frozen=True)
class Scene:
    """A rendered scene: uint8 [S, S, 3], its objects, its mood's index or -1."""

    pixels: np.ndarray
    objects: Objects
    mood: int


@dataclass(frozen=True)
class Caption:
    """A caption and what it claims, as members of what `claims_of` gives."""

    text: str
    claims: tuple[int, ...]


@dataclass(frozen=True)
class Backdrop:
    """A painted background, 256 × 256 pixels, and its mood's index or -1."""

    image: Image.Image
    mood: int


@functools.cache
def training_glyphs() -> dict[str, dict[Family, tuple[Glyph, ...]]]:
    """Every name that a training family draws, in alphabetical order, with its drawings by family."""
    families = {family: family_glyphs(family) for family in TRAINING_FAMILIES}
    names = sorted(set().union(*families.values()))
    return {name: {f: glyphs[name] for f, glyphs in families.items() if name in glyphs} for name in names}


@functools.cache
def training_names() -> list[str]:
    """The names of `training_glyphs`; indices of names count in this list."""
    return list(training_glyphs())


def num_claims() -> int:
    """How many claims there are: a name, a name with a colour, a mood."""
    return len(training_names()) * (1 + len(COLOURS)) + len(MOODS)


def paint_backdrops(rng: np.random.Generator, count: int) -> list[Backdrop]:
    """Backgrounds to draw scenes on; half of them have a mood."""
    moods = list(MOODS)
    chosen = [int(rng.integers(len(moods))) if rng.random() < 0.5 else -1 for _ in range(count)]
    side = BACKDROP_PIXELS
    return [Backdrop(background(rng, side, side, moods[m] if m >= 0 else None), m) for m in chosen]


def draw_scene(
    rng: np.random.Generator, kind: SceneKind, backdrops: list[Backdrop], *, only: int | None = None
) -> Scene:
    """Draw a training scene, with fewer objects than asked for where no place is left.

    Args:
        rng: Where all choices come from.
        kind: Its size, at most `BACKDROP_PIXELS`, and what it holds.
        backdrops: At least one.
        only: The index of the name to draw alone; random names when it is left out.
    """
    backdrop = backdrops[int(rng.integers(len(backdrops)))]
    canvas = _cut(rng, backdrop.image, kind.pixels)
    count = 1 if only is not None else int(rng.integers(kind.objects[0], kind.objects[1] + 1))
    low, high = kind.style.sizes
    high = max(1.5 * low, min(high, 1.1 / math.sqrt(count)))  # many objects must be small to find a place
    boxes = np.zeros((0, 4))
    objects: list[tuple[int, int]] = []
    for _ in range(count):
        repeated = bool(objects) and rng.random() < 0.15
        name = only if only is not None else int(rng.integers(len(training_names())))
        name, colour = objects[-1][0] if repeated else name, int(rng.integers(len(COLOURS)))
        field = _pick_field(rng, training_names()[name])
        placement = place(rng, field, kind.pixels, kind.style, size=low * (high / low) ** rng.random())
        spot = free_spot(rng, boxes, placement, canvas.size, kind.style.overlap)
        if spot is None:
            continue
        placement = dataclasses.replace(placement, x=spot[0], y=spot[1])
        left, top = placement.corner
        boxes = np.concatenate([boxes, [(left, top, left + placement.width, top + placement.height)]])
        paint(canvas, rng, field, placement, list(COLOURS)[colour], kind.style.stroke)
        objects.append((name, colour))
    return Scene(np.asarray(_compressed(rng, canvas)), tuple(objects), backdrop.mood)


def _cut(rng: np.random.Generator, image: Image.Image, side: int) -> Image.Image:
    """A random square of the image, at least `side` pixels wide, scaled to `side`."""
    reach = int(rng.integers(side, image.width + 1))
    x, y = (int(rng.integers(0, image.width - reach + 1)) for _ in range(2))
    return image.resize((side, side), Image.Resampling.BILINEAR, (x, y, x + reach, y + reach))


def _pick_field(rng: np.random.Generator, name: str) -> Field:
    """One of the name's drawings: each family as often as the others, then each drawing."""
    by_family = list(training_glyphs()[name].values())
    glyphs = by_family[int(rng.integers(len(by_family)))]
    return field_of(glyphs[int(rng.integers(len(glyphs)))])


def _compressed(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """The image as it is, or one time in four after JPEG."""
    if rng.random() >= 0.25:
        return image
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=int(rng.integers(35, 90)))
    return Image.open(stream)


def claims_of(objects: Objects, mood: int) -> set[int]:
    """Everything that captions may claim of a scene, as numbers below `num_claims()`."""
    names, colours = len(training_names()), len(COLOURS)
    claims = {name for name, _ in objects} | {names + name * colours + colour for name, colour in objects}
    return claims | ({names * (1 + colours) + mood} if mood >= 0 else set())


def write_caption(
    rng: np.random.Generator, scene: Scene, prompts: tuple[str, ...], *, bare: bool = False
) -> Caption:
    """Name one to four of a scene's objects, some with their colour; end with the mood now and then.

    Args:
        rng: Where the choices come from.
        scene: Its objects, at least one.
        prompts: Templates with one {} for captions of a single name; half of those use one.
        bare: Names alone, without colour, mood or template.
    """
    held: dict[int, list[int]] = {}
    for name, colour in scene.objects:
        held.setdefault(name, []).append(colour)
    wanted = 1 + int(rng.choice(len(NAMED_SHARES), p=NAMED_SHARES))
    chosen = [int(name) for name in rng.permutation(list(held))[:wanted]]
    told = [_tell(rng, name, held[name], bare=bare) for name in chosen]
    claims = tuple(claim for _, claimed in told for claim in claimed)
    if len(told) > 1:
        text = " and ".join(_with_article(phrase) for phrase, _ in told)
    else:
        text = _frame(rng, told[0][0], prompts, bare=bare)
    if not bare and scene.mood >= 0 and not text.endswith(".") and rng.random() < 0.12:
        mood_claim = len(training_names()) * (1 + len(COLOURS)) + scene.mood
        return Caption(f"{text} {list(MOODS)[scene.mood]}", (*claims, mood_claim))
    return Caption(text, claims)


def _tell(
    rng: np.random.Generator, name: int, colours_held: list[int], *, bare: bool
) -> tuple[str, tuple[int, ...]]:
    """A name, perhaps with its colour and number, and the claims."""
    names, colours = training_names(), list(COLOURS)
    noun = names[name]
    claims: tuple[int, ...] = (name,)
    if not bare and len(set(colours_held)) == 1 and rng.random() < 0.4:
        noun = f"{colours[colours_held[0]]} {noun}"
        claims += (len(names) + name * len(colours) + colours_held[0],)
    if len(colours_held) > 1 and rng.random() < 0.5:
        noun = f"{NUMBERS.get(len(colours_held), 'many')} {noun}s"
    return noun, claims


def _frame(rng: np.random.Generator, phrase: str, prompts: tuple[str, ...], *, bare: bool) -> str:
    """A single phrase as it is, with its article, or in one of the prompts."""
    choice = rng.random()
    if choice < 0.55 and not bare:
        return prompts[int(rng.integers(len(prompts)))].format(phrase)
    return _with_article(phrase) if choice < 0.85 else phrase


def _with_article(phrase: str) -> str:
    """`a car`, `an anchor`, `two dogs`."""
    if phrase.split()[0] in {*NUMBERS.values(), "many"}:
        return phrase
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
