"""Drawings of named objects: the glyphs of four icon fonts, as fields of distances to their outline.

The fonts and their name tables come with the package `qtawesome` (extra `demo`); it is found, not imported,
because importing it wants Qt. A name counts when it is an ImageNet-21K lemma and can be seen.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from for_ray.datasets.vocabulary import imagenet21k_lemmas
from for_ray.errors import ConfigError

Family = Literal["material", "awesome", "phosphor", "remix"]

# Family -> (font file, name table) under `qtawesome/fonts/`, the versions' numbers left out.
FONT_FILES: dict[Family, tuple[tuple[str, str], ...]] = {
    "material": (("materialdesignicons6-webfont", "materialdesignicons6-webfont-charmap"),),
    "awesome": (
        ("fontawesome6-solid-webfont", "fontawesome6-solid-webfont-charmap"),
        ("fontawesome6-regular-webfont", "fontawesome6-regular-webfont-charmap"),
    ),
    "phosphor": (("phosphor", "phosphor-charmap"),),
    "remix": (("remixicon", "remixicon-charmap"),),
}

STYLE_SUFFIXES = frozenset({
    "outline", "fill", "bold", "thin", "light", "duotone", "line",
    "variant", "regular", "simple", "straight", "profile", "side",
})  # fmt: skip

# Lemmas by accident of spelling: marks of user interfaces, letters, plain shapes, brands, acts, places
# without a look of their own. Reviewed by hand against the drawings.
NOT_OBJECTS = frozenset(
    " ".join(
        """
        a, b, c, d, e, airport, album, amazon, android, antenna, aperture, arch, assistant, atm,
        attachment, axis, backspace, bars, beach, bill, bolt, bootstrap, boxing, braces, browser, cast,
        chat, child, circle, club, comma, compress, connection, console, counter, cross, crowd, cursor,
        dashboard, delta, desktop, device, diameter, display, diving, docker, draw, drive, drop, edge,
        ellipse, equal, equalizer, ethernet, exponent, fencing, file, filter, finder, flash, flood,
        font, food, forward, gallery, game, golf, grain, grid, grip, guide, gymnastics, hail, hash,
        head, help, hexagon, home, hotspot, human, image, joint, lan, landscape, launch, leak, library,
        line, link, loader, matrix, mastodon, medium, memory, menu, mine, mound, network, number one,
        nutrition, octagon, opera, outlet, paint, paste, pentagon, people, phone call, place of worship,
        plane, pocket, poll, polygon, post, pound, power, print, pulse, radius, record, restroom,
        rhombus, riding, ring, route, rowing, security, sensor, separator, shore, skateboarding,
        sledding, soccer, spa, spam, spinner, square, stock, stop, store, surfing, swim, switch, tab,
        target, tennis, terminal, theater, toggle, track, transfer, triangle, user, vanity, video, vip,
        voicemail, wall, water, wave, web, wifi, wind, wrap, yeast
        """.split()  # noqa: SIM905  # a list of 150 names reads worse
    ).split(", ")
)

FIELD_PIXELS = 128  # the side of a field
GLYPH_PIXELS = 96  # the longer side of the glyph within it, its margins in the font counted: strokes can grow
LEVELS_PER_PIXEL = 8  # a field's value is 128 + 8 · (distance inside the outline, in field pixels)


@dataclass(frozen=True)
class Glyph:
    """One drawing: which character of which font file, and what it shows."""

    name: str
    family: Family
    font_path: Path
    codepoint: int


@dataclass(frozen=True)
class Field:
    """A glyph's distances to its outline, two greyscale images of 128 × 128 pixels.

    `edge` is 128 on the outline and grows by 8 a pixel towards the inside; `body` is the same after the
    holes that the glyph encloses were filled. `extent` is the glyph's width and height in field pixels; it
    lies in the middle.
    """

    edge: Image.Image
    body: Image.Image
    extent: tuple[int, int]


def font_folder() -> Path:
    """Where the fonts of `qtawesome` lie.

    Raises:
        ConfigError: The package is not installed.
    """
    try:
        distribution = importlib.metadata.distribution("qtawesome")
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(
            "the picture book draws the fonts of the package qtawesome, which is not installed; "
            "install it: pip install 'for_ray[demo]'"
        ) from error
    return Path(str(distribution.locate_file("qtawesome/fonts")))


def object_name(glyph_name: str) -> str:
    """What a glyph is called once its style is left out: `car-battery-outline` is a `car battery`."""
    words = glyph_name.split("-")
    while len(words) > 1 and (words[-1] in STYLE_SUFFIXES or words[-1].isdigit()):
        words.pop()
    return " ".join(words)


@functools.cache
def visible_lemmas() -> frozenset[str]:
    """Every ImageNet-21K lemma in lower case, without `NOT_OBJECTS`."""
    return frozenset(lemma.lower() for lemmas in imagenet21k_lemmas() for lemma in lemmas) - NOT_OBJECTS


@functools.cache
def family_glyphs(family: Family) -> dict[str, tuple[Glyph, ...]]:
    """All drawings of visible objects in one family, by name; names and drawings in alphabetical order.

    Raises:
        ConfigError: `qtawesome` is missing, or lacks this family's font.
    """
    found: dict[str, list[Glyph]] = {}
    for font, table in FONT_FILES[family]:
        font_path = _versioned_file(font, ".ttf")
        codepoints: dict[str, str] = json.loads(_versioned_file(table, ".json").read_text(encoding="utf-8"))
        for glyph_name, codepoint in sorted(codepoints.items()):
            name = object_name(glyph_name)
            if name in visible_lemmas() and "duotone" not in glyph_name:
                found.setdefault(name, []).append(Glyph(name, family, font_path, int(codepoint, 16)))
    return {name: tuple(found[name]) for name in sorted(found)}


def _versioned_file(stem: str, suffix: str) -> Path:
    """The one file `<stem>-<version><suffix>` of the font folder."""
    paths = sorted(
        path for path in font_folder().glob(f"{stem}-*{suffix}") if path.name[len(stem) + 1 :][0].isdigit()
    )
    if not paths:
        raise ConfigError(
            f"qtawesome has no file {stem}-*{suffix}; install the version that constraints.txt pins"
        )
    return paths[-1]


@functools.lru_cache(maxsize=8192)
def field_of(glyph: Glyph) -> Field:
    """Draw a glyph and measure every pixel's distance to its outline; kept for the process's lifetime.

    Raises:
        ConfigError: The font has no ink for the character.
    """
    coverage = _draw_glyph(glyph)
    inside = coverage >= 128
    if not inside.any():
        raise ConfigError(
            f"the font {glyph.font_path.name} draws nothing for {glyph.name}; reinstall qtawesome"
        )
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    distance = ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside)
    # The transform counts whole pixels; a pixel at the outline knows better from how much ink it holds.
    rim = np.abs(distance) <= 1
    distance = np.where(rim, coverage / 255.0 - 0.5, distance - 0.5 * np.sign(distance))
    edge = np.clip(np.rint(128 + LEVELS_PER_PIXEL * distance), 0, 255).astype(np.uint8)
    filled = ndimage.binary_fill_holes(inside)
    # Two pixels into the strokes, so that no seam shows where a hole meets them.
    inner = ndimage.binary_dilation(filled & ~inside, iterations=2) & filled
    return Field(
        edge=Image.fromarray(edge),
        body=Image.fromarray(np.where(inner, np.uint8(255), edge)),
        extent=(int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)),
    )


def _draw_glyph(glyph: Glyph) -> np.ndarray:
    """The glyph's ink [128, 128], uint8, in the middle, its longer side with the font's margins 96 pixels."""
    left, top, right, bottom = _font(glyph.font_path, GLYPH_PIXELS).getbbox(chr(glyph.codepoint))
    size = max(8, round(GLYPH_PIXELS * GLYPH_PIXELS / max(right - left, bottom - top, 1)))
    font = _font(glyph.font_path, size)
    left, top, right, bottom = font.getbbox(chr(glyph.codepoint))
    image = Image.new("L", (FIELD_PIXELS, FIELD_PIXELS))
    corner = ((FIELD_PIXELS - left - right) / 2, (FIELD_PIXELS - top - bottom) / 2)
    ImageDraw.Draw(image).text(corner, chr(glyph.codepoint), fill=255, font=font)
    return np.asarray(image)


@functools.lru_cache(maxsize=256)
def _font(path: Path, size_pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), size_pixels, layout_engine=ImageFont.Layout.BASIC)
