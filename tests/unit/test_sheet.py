"""A sheet is read back as pixels: where the images, boxes and grey tiles are."""

import io
import struct
import sys

import numpy as np
import pillow_heif
import pytest
from numpy.typing import NDArray
from PIL import Image

from for_ray.errors import DataError
from for_ray.sheet import MAX_TILES, Box, Tile, columns_for, draw_sheet, thumbnail

# The geometry of one card, from the sheet's left and top: margin 28, header 76, padding 8.
LEFT, TOP, SIDE = 28 + 8, 28 + 76 + 8, 240
STEP_X, STEP_Y = 240 + 2 * 8 + 14, 240 + 8 + 30 + 14
YELLOW, GREY, BLACK = (255, 214, 10), (74, 78, 86), (14, 15, 18)


def encoded(
    width: int, height: int, colour: object = (0, 0, 255), *, mode: str = "RGB", **options: object
) -> bytes:
    written = io.BytesIO()
    Image.new(mode, (width, height), colour).save(written, **{"format": "PNG", **options})  # type: ignore[arg-type]
    return written.getvalue()


def pixels(sheet: bytes) -> NDArray[np.int64]:
    with Image.open(io.BytesIO(sheet)) as image:
        assert image.format == "JPEG"
        return np.asarray(image.convert("RGB"), np.int64)


def picture(sheet: bytes, number: int = 0, num_columns: int = 3) -> NDArray[np.int64]:
    row, column = divmod(number, num_columns)
    left, top = LEFT + column * STEP_X, TOP + row * STEP_Y
    return pixels(sheet)[top : top + SIDE, left : left + SIDE]


def is_colour(
    area: NDArray[np.int64], colour: tuple[int, int, int], tolerance: int = 40
) -> NDArray[np.bool_]:
    return np.abs(area - np.asarray(colour)).max(axis=-1) <= tolerance


def extent(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


@pytest.mark.parametrize(
    ("width", "height", "place"), [(400, 200, (0, 60, 239, 179)), (30, 90, (80, 0, 159, 239))]
)
def test_aspect_ratio_is_kept(width: int, height: int, place: tuple[int, int, int, int]) -> None:
    area = picture(draw_sheet([Tile("a", encoded(width, height))], title="q"))
    assert extent(is_colour(area, (0, 0, 255))) == pytest.approx(place, abs=1)
    outside = np.ones(area.shape[:2], bool)
    outside[place[1] : place[3] + 1, place[0] : place[2] + 1] = False
    assert is_colour(area[8:-8, 8:-8], BLACK)[outside[8:-8, 8:-8]].mean() > 0.97


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0.25, 0.5, 0.75, 1.0), (60, 120, 179, 178)),
        ((0.5, 0.0, 1.0, 0.5), (120, 60, 237, 120)),
        ((0.0, 0.0, 1.0, 1.0), (1, 60, 238, 179)),
    ],
)
def test_box_lies_on_the_letterboxed_image(box: Box, expected: tuple[int, int, int, int]) -> None:
    area = picture(draw_sheet([Tile("a", encoded(400, 200), box)], title="q"))
    assert extent(is_colour(area, YELLOW)) == pytest.approx(expected, abs=2)


def test_box_has_a_dark_outline_on_a_white_image() -> None:
    area = picture(draw_sheet([Tile("a", encoded(200, 200, "white"), (0.25, 0.25, 0.75, 0.75))], title="q"))
    row = area[120].max(axis=-1)
    first = int(np.flatnonzero(is_colour(area, YELLOW)[120])[0])
    assert row[first - 3 : first].min() < 90
    assert row[first + 2 : first + 7].min() < 90


@pytest.mark.parametrize("box", [(0.5, 0.5, 0.5, 0.5), (0.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0)])
def test_box_without_extent_is_still_seen(box: Box) -> None:
    x0, y0, x1, y1 = extent(
        is_colour(picture(draw_sheet([Tile("a", encoded(200, 200), box)], title="q")), YELLOW)
    )
    assert x1 - x0 >= 9
    assert y1 - y0 >= 9
    assert min(x0, y0) >= 0
    assert max(x1, y1) < SIDE


def test_tiles_stand_in_rows() -> None:
    colours = [(255, 0, 0), (0, 160, 0), (0, 0, 255), (255, 0, 255)]
    sheet = draw_sheet([Tile("a", encoded(50, 50, colour)) for colour in colours], title="q", num_columns=3)
    for number, colour in enumerate(colours):
        assert is_colour(picture(sheet, number), colour)[8:-8, 8:-8].all()


@pytest.mark.parametrize(
    "broken",
    [b"", b"nonsense", encoded(64, 64)[:60], encoded(64, 64, format="JPEG")[:200]],
    ids=["empty", "no image", "cut PNG", "cut JPEG"],
)
def test_broken_image_is_a_grey_tile_among_good_ones(broken: bytes) -> None:
    tiles = [Tile("bad", broken, (0.1, 0.1, 0.9, 0.9)), Tile("good", encoded(50, 50))]
    sheet = draw_sheet(tiles, title="q")
    assert is_colour(picture(sheet), GREY).mean() > 0.9
    assert not is_colour(picture(sheet), YELLOW).any()
    assert is_colour(picture(sheet, 1), (0, 0, 255))[8:-8, 8:-8].all()
    assert sheet == draw_sheet(tiles, title="q")


def test_missing_image_shows_its_reason() -> None:
    gone = picture(draw_sheet([Tile("a", problem="gone since the index was built")], title="q"))
    other = picture(draw_sheet([Tile("a", problem="no permission")], title="q"))
    assert is_colour(gone, GREY).mean() > 0.9
    letters = gone.min(axis=-1) > 150
    assert 200 < letters.sum() < 5000
    assert (gone != other).any()


def test_image_with_too_many_pixels_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("for_ray.sheet.MAX_PIXELS", 9_999)
    assert is_colour(picture(draw_sheet([Tile("a", encoded(100, 100))], title="q")), GREY).mean() > 0.9


def test_decoder_that_fails_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise struct.error

    monkeypatch.setattr(Image, "open", fail)
    sheet = draw_sheet([Tile("a", b"x")], title="q")
    monkeypatch.undo()
    assert is_colour(picture(sheet), GREY).mean() > 0.9


def test_exif_turned_image_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    area = picture(draw_sheet([Tile("a", encoded(200, 100, exif=exif))], title="q"))
    assert extent(is_colour(area, (0, 0, 255))) == pytest.approx((60, 0, 179, 239), abs=1)


@pytest.mark.parametrize(
    ("content", "colour"),
    [
        (encoded(40, 40, (255, 0, 0, 0), mode="RGBA"), (255, 255, 255)),
        (encoded(40, 40, 51400, mode="I;16"), (200, 200, 200)),
        (encoded(40, 40, (0, 255, 255, 0), mode="CMYK", format="TIFF"), (255, 0, 0)),
        (encoded(40, 40, 1, mode="1"), (255, 255, 255)),
    ],
    ids=["transparent", "16 bit", "CMYK", "1 bit"],
)
def test_unusual_modes(content: bytes, colour: tuple[int, int, int]) -> None:
    area = picture(draw_sheet([Tile("a", content)], title="q"))
    assert is_colour(area, colour, 6)[8:-8, 8:-8].all()


@pytest.mark.parametrize("is_installed", [True, False])
def test_a_heic_is_shown_where_its_package_is_installed(
    monkeypatch: pytest.MonkeyPatch, is_installed: bool
) -> None:
    written = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (64, 64), (200, 30, 30))).save(written, quality=90)
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])  # as in a new process
    if not is_installed:
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
    area = picture(draw_sheet([Tile("a", written.getvalue())], title="q"))
    assert bool(is_colour(area, (200, 30, 30), 12)[8:-8, 8:-8].all()) == is_installed
    assert bool((is_colour(area, GREY, 6)).mean() > 0.5) != is_installed


def test_only_the_first_tiles_are_drawn() -> None:
    tiles = [Tile(str(number)) for number in range(MAX_TILES + 1)]
    sheet = draw_sheet(tiles, title="q", tile_pixels=48)
    cut = draw_sheet(tiles[:-1], title="q", tile_pixels=48)
    assert pixels(sheet).shape == pixels(cut).shape
    assert (pixels(sheet)[104:] == pixels(cut)[104:]).mean() > 0.999
    assert sheet != cut


def test_title_and_subtitle_are_drawn_and_nothing_is_too_wide() -> None:
    empty = draw_sheet([], title="q")
    assert pixels(empty).shape == (132, 852, 3)
    for title in ("a red car", "word " * 400, "x" * 50_000, "\x00\n\u202e\ud83d", ""):
        drawn = pixels(draw_sheet([], title=title))
        assert drawn.shape == (132, 852, 3)
        assert is_colour(drawn[:, -26:], (22, 24, 28), 12).all()
    assert (pixels(empty) != pixels(draw_sheet([], title="dog"))).any()
    assert (pixels(empty) != pixels(draw_sheet([], title="q", subtitle="s"))).any()


def test_example_stands_beside_the_title() -> None:
    header = pixels(draw_sheet([], title="like this", example=encoded(20, 20, (255, 0, 0))))[:104]
    x0, y0, x1, y1 = extent(is_colour(header, (255, 0, 0)))
    assert (x0, y0) == pytest.approx((28, 24), abs=1)
    assert x1 - x0 == pytest.approx(55, abs=1)
    assert y1 - y0 == pytest.approx(55, abs=1)


@pytest.mark.parametrize(
    ("num_tiles", "columns"), [(0, 3), (1, 3), (3, 3), (8, 4), (9, 3), (10, 5), (12, 4), (20, 5), (60, 7)]
)
def test_columns(num_tiles: int, columns: int) -> None:
    assert columns_for(num_tiles) == columns


@pytest.mark.parametrize("wrong", [{"tile_pixels": 47}, {"num_columns": 0}])
def test_wrong_sizes_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="a sheet needs tiles of 48 pixels and 1 column"):
        draw_sheet([], title="q", **wrong)  # type: ignore[arg-type]


def test_a_thumbnail_is_whole_upright_and_small() -> None:
    raw = encoded(400, 100, (0, 0, 255))
    with Image.open(io.BytesIO(thumbnail(raw, 80))) as small:
        assert (small.format, small.size) == ("JPEG", (80, 20))
        assert is_colour(np.asarray(small, np.int64), (0, 0, 255)).all()
    with pytest.raises(DataError):
        thumbnail(b"<html>", 80)


def test_boxes_of_several_names_have_the_legends_colours() -> None:
    boxes = ((0, (0.0, 0.0, 0.4, 0.4)), (1, (0.6, 0.6, 1.0, 1.0)), (7, (0.6, 0.0, 1.0, 0.4)))
    white = encoded(100, 100, (255, 255, 255))
    names = ["a dog", "a frisbee", *(f"{number} very long names of things" for number in range(6))]
    sheet = draw_sheet([Tile("a", white, (0, 0, 1, 1), boxes=boxes)], title="several", legend=names)
    blue = (64, 200, 255)
    assert extent(is_colour(picture(sheet), YELLOW))[2:] == (97, 97)
    assert extent(is_colour(picture(sheet), blue))[1:] == (1, 238, 238)
    for colour in (YELLOW, blue):
        assert is_colour(pixels(sheet)[60:84], colour).any()
    assert not is_colour(pixels(draw_sheet([Tile("a", white, boxes=boxes[:1])], title="x")), blue).any()
