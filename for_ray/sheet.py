"""A contact sheet: the images of an answer with their boxes, as one picture. PIL only, no reading of uris."""

from __future__ import annotations

import bisect
import contextlib
import importlib
import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from for_ray.errors import DataError

MAX_TILES = 60
"""More than these don't make one picture; the sheet says of how many they are the first."""

MAX_PIXELS = 200_000_000
"""An image of more pixels is not decoded for a tile of a few hundred: its tile says so."""

_MARGIN, _GAP, _PADDING = 28, 14, 8
_HEADER, _CAPTION = 76, 30
_CORNER, _SMALLEST_BOX = 8, 12
_GROUND, _CARD, _WELL = (22, 24, 28), (33, 36, 42), (14, 15, 18)
_TITLE, _TEXT, _DIM = (244, 245, 247), (214, 217, 222), (139, 145, 155)
_BOX, _BOX_EDGE = (255, 214, 10), (20, 20, 20)
_COLOURS = (_BOX, (64, 200, 255), (255, 105, 180), (120, 230, 90), (255, 140, 40), (180, 140, 255))
_GONE = (74, 78, 86)

_Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Tile:
    """One image of a sheet.

    Attributes:
        caption: What stands on the left below the image, such as its file name; shortened in its middle.
        image: The encoded file (JPEG, PNG, …); None when there is none to show.
        box: x0, y0, x1, y1 as fractions of the upright image's width and height; None draws none.
        score: What stands on the right below the image; None leaves the place empty.
        problem: Why there is no image: a few words that the grey tile shows.
        boxes: Instead of `box` where an image is asked for several things: each with its place in the sheet's
            legend, whose colour it has.
    """

    caption: str
    image: bytes | None = None
    box: Box | None = None
    score: float | None = None
    problem: str = "no image"
    boxes: tuple[tuple[int, Box], ...] = ()


def draw_sheet(
    tiles: Sequence[Tile],
    *,
    title: str,
    subtitle: str = "",
    example: bytes | None = None,
    tile_pixels: int = 240,
    num_columns: int | None = None,
    legend: Sequence[str] = (),
) -> bytes:
    """Draw a sheet of the first `MAX_TILES` tiles, numbered from 1, in rows.

    An image that can't be decoded becomes a grey tile with the reason: a sheet is never lost to one image.

    Args:
        tiles: Best first; none draws a sheet that says that nothing was found.
        title: The query; shortened when it is wider than the sheet.
        subtitle: A smaller line below the title.
        example: The encoded image that was asked with; shown small beside the title.
        tile_pixels: Side of the square that an image is letterboxed into.
        num_columns: Tiles in a row; None chooses by their number.
        legend: What the colours of `Tile.boxes` stand for; shown before the subtitle.

    Returns:
        A JPEG file; the same bytes for the same arguments.

    Raises:
        ValueError: `tile_pixels` is under 48, or `num_columns` is under 1.
    """
    if tile_pixels < 48 or (num_columns is not None and num_columns < 1):
        raise ValueError(
            f"a sheet needs tiles of 48 pixels and 1 column or more, got {tile_pixels} and {num_columns}"
        )
    shown = list(tiles[:MAX_TILES])
    num_columns = num_columns or columns_for(len(shown))
    num_rows = math.ceil(len(shown) / num_columns)
    card_width, card_height = tile_pixels + 2 * _PADDING, tile_pixels + _PADDING + _CAPTION
    width = 2 * _MARGIN + num_columns * (card_width + _GAP) - _GAP
    height = _MARGIN + _HEADER + max(num_rows * (card_height + _GAP) - _GAP, 0) + _MARGIN
    sheet = Image.new("RGB", (width, height), _GROUND)
    _draw_header(sheet, title, subtitle or _counted(len(shown), len(tiles)), example, legend)
    for number, tile in enumerate(shown):
        row, column = divmod(number, num_columns)
        card = _draw_card(tile, number + 1, tile_pixels)
        left, top = _MARGIN + column * (card_width + _GAP), _MARGIN + _HEADER + row * (card_height + _GAP)
        sheet.paste(card, (left, top), _rounded(card.size))
    return _as_jpeg(sheet)


def thumbnail(image: bytes, side: int) -> bytes:
    """A small copy of an encoded image, upright and whole: a JPEG file whose longer side is `side` pixels.

    Raises:
        DataError: It can't be decoded.
    """
    written = io.BytesIO()
    _decode(image, side).save(written, "JPEG", quality=80, optimize=True)
    return written.getvalue()


def columns_for(num_tiles: int) -> int:
    """Tiles in a row, 3 to 8: near a page's shape, and such that the last row has few gaps."""
    wished = math.sqrt(1.8 * num_tiles)
    choices = range(min(max(int(wished) - 1, 3), 7), min(max(int(wished) + 1, 3), 8) + 1)
    return min(choices, key=lambda columns: (-num_tiles % columns, abs(columns - wished)))


def _counted(num_shown: int, num_tiles: int) -> str:
    if not num_tiles:
        return "nothing found"
    if num_shown < num_tiles:
        return f"the first {num_shown} of {num_tiles:,} images"
    return "1 image" if num_tiles == 1 else f"{num_tiles} images"


def _draw_header(
    sheet: Image.Image, title: str, subtitle: str, example: bytes | None, legend: Sequence[str]
) -> None:
    left = _MARGIN
    if example is not None:
        side = _HEADER - 20
        thumbnail, _ = _letterbox(Tile("", example, problem="?"), side)
        sheet.paste(thumbnail, (left, _MARGIN - 4), _rounded(thumbnail.size))
        left += side + 16
    draw = ImageDraw.Draw(sheet)
    room = sheet.width - _MARGIN - left
    draw.text((left, _MARGIN - 6), _shortened(title, 30, room), font=_font(30), fill=_TITLE)
    left = _draw_legend(draw, legend, left, sheet.width - _MARGIN)
    room = sheet.width - _MARGIN - left
    draw.text((left, _MARGIN + 34), _shortened(subtitle, 15, room), font=_font(15), fill=_DIM)


def _draw_legend(draw: ImageDraw.ImageDraw, legend: Sequence[str], left: int, right: int) -> int:
    """The names in their boxes' colours, in the left two thirds; where the next text begins."""
    end = left + (right - left) * 2 // 3
    for place, name in enumerate(legend):
        label = _shortened(name, 15, min(240, end - left))
        if not label:
            break
        draw.text((left, _MARGIN + 34), label, font=_font(15), fill=_COLOURS[place % len(_COLOURS)])
        left += math.ceil(_width(label, 15)) + 18
    return left


def _draw_card(tile: Tile, rank: int, tile_pixels: int) -> Image.Image:
    card = Image.new("RGB", (tile_pixels + 2 * _PADDING, tile_pixels + _PADDING + _CAPTION), _CARD)
    picture, place = _letterbox(tile, tile_pixels)
    if place:
        for colour, box in tile.boxes or ([(0, tile.box)] if tile.box else []):
            _draw_box(picture, box, place, _COLOURS[colour % len(_COLOURS)])
    card.paste(picture, (_PADDING, _PADDING), _rounded(picture.size, 4))
    draw = ImageDraw.Draw(card)
    middle = tile_pixels + _PADDING + _CAPTION // 2
    right = card.width - _PADDING - 2
    if tile.score is not None:
        draw.text((right, middle), f"{tile.score:.3f}", font=_font(14), fill=_TEXT, anchor="rm")
        right -= 50
    number = f"{rank}"
    draw.text((_PADDING + 2, middle), number, font=_font(16), fill=_BOX, anchor="lm")
    left = _PADDING + 12 + _width(number, 16)
    caption = _shortened(tile.caption, 12, right - left)
    draw.text((left, middle), caption, font=_font(12), fill=_DIM, anchor="lm")
    return card


def _letterbox(tile: Tile, side: int) -> tuple[Image.Image, tuple[int, int, int, int] | None]:
    """The image in a square, and where in it: left, top, width, height in pixels; None for a grey tile."""
    ground = Image.new("RGB", (side, side), _WELL)
    image = None
    problem = tile.problem
    if tile.image is not None:
        try:
            image = _decode(tile.image, side)
        except DataError as error:
            problem = f"can't be shown: {error}"
    if image is None:
        return _grey(side, problem), None
    place = ((side - image.width) // 2, (side - image.height) // 2, image.width, image.height)
    ground.paste(image, place[:2])
    return ground, place


def _decode(content: bytes, side: int) -> Image.Image:
    """Upright, RGB, its longer side `side`; what is transparent lies on white, as on a page."""
    try:
        opened = _open(content)
        opened.draft("RGB", (2 * side, 2 * side))
        upright = _flat(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError as error:
        raise DataError(
            "not an image that Pillow knows"
        ) from error  # its own words name an address in memory
    except Exception as error:  # Pillow's decoders raise anything on broken files
        raise DataError(str(error) or type(error).__name__) from error
    scale = side / max(upright.size)
    size = (max(round(upright.width * scale), 1), max(round(upright.height * scale), 1))
    return upright.resize(size, Image.Resampling.LANCZOS)


def _open(content: bytes) -> Image.Image:
    with contextlib.suppress(
        ImportError
    ):  # the package for HEIC, which the index reads where it is installed
        importlib.import_module("pillow_heif").register_heif_opener(thumbnails=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        opened = Image.open(io.BytesIO(content))
    if opened.width * opened.height > MAX_PIXELS:
        raise DataError(f"{opened.width} × {opened.height} pixels")
    return opened


def _flat(image: Image.Image) -> Image.Image:
    """RGB, without transparency; 16-bit greys as 8 bits."""
    if image.mode.startswith("I"):
        image = image.convert("F").point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", with_alpha.size, "white"), with_alpha)
    return image.convert("RGB")


def _draw_box(picture: Image.Image, box: Box, place: tuple[int, int, int, int], colour: _Colour) -> None:
    """Three pixels of bright colour between two thin dark lines: seen on any image."""
    left, top, width, height = place
    x0, x1 = _span(left, width, box[0], box[2], picture.width)
    y0, y1 = _span(top, height, box[1], box[3], picture.height)
    draw = ImageDraw.Draw(picture)
    draw.rounded_rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), radius=4, outline=_BOX_EDGE, width=5)
    draw.rounded_rectangle((x0, y0, x1, y1), radius=3, outline=colour, width=3)


def _span(start: int, length: int, low: float, high: float, side: int) -> tuple[int, int]:
    """First and last pixel of a box's side: `_SMALLEST_BOX` pixels or more, and no line beyond the square."""
    first, last = start + min(low, high) * (length - 1), start + max(low, high) * (length - 1)
    short = max(_SMALLEST_BOX - (last - first), 0.0) / 2
    first, last = first - short, last + short
    shift = max(1 - first, 0.0) - max(last - (side - 2), 0.0)
    return max(round(first + shift), 1), min(round(last + shift), side - 2)


def _grey(side: int, problem: str) -> Image.Image:
    """A tile without an image: the reason in its middle, in at most five lines."""
    tile = Image.new("RGB", (side, side), _GONE)
    size = 14 if side >= 160 else 10
    lines: list[str] = []
    for word in problem.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _width(longer, size) <= side - 24:
            lines[-1] = longer
        else:
            lines.append(word)
    text = "\n".join(_shortened(line, size, side - 24) for line in lines[:5])
    draw = ImageDraw.Draw(tile)
    middle = (side / 2, side / 2)
    draw.multiline_text(middle, text, font=_font(size), fill=_TEXT, anchor="mm", align="center", spacing=6)
    return tile


def _shortened(text: str, size: int, room: float) -> str:
    """One printable line, no wider than `room` pixels; the middle gives way: names differ at their ends."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text[:2000]).split())
    if _width(text, size) <= room:
        return text

    def with_letters(kept: int) -> str:
        head = math.ceil(kept / 2)
        return f"{text[:head].rstrip()}…{text[len(text) - (kept - head) :].lstrip()}" if kept else ""

    too_wide = bisect.bisect_right(range(len(text)), room, key=lambda kept: _width(with_letters(kept), size))
    return with_letters(max(too_wide - 1, 0))


def _width(text: str, size: int) -> float:
    return _font(size).getlength(text)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise TypeError("Pillow was built without FreeType: install the wheel of Pillow from a package index")
    return font


@cache
def _rounded(size: tuple[int, int], radius: int = _CORNER) -> Image.Image:
    """A mask with smooth round corners: PIL's own have steps, so it is drawn four times as large."""
    large = Image.new("L", (size[0] * 4, size[1] * 4), 0)
    ImageDraw.Draw(large).rounded_rectangle((0, 0, *(4 * side - 1 for side in size)), radius * 4, fill=255)
    return large.resize(size, Image.Resampling.BOX)


def _as_jpeg(sheet: Image.Image) -> bytes:
    written = io.BytesIO()
    # 4:4:4: a yellow line three pixels wide loses its colour with halved chroma.
    sheet.save(written, "JPEG", quality=90, subsampling=0, optimize=True)
    return written.getvalue()
