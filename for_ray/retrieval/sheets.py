"""An answer as a contact sheet, its images read from where they lie; and the picture that is asked with."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from for_ray import storage
from for_ray.errors import ConfigError, DataError, ForRayError
from for_ray.retrieval.question import Hit
from for_ray.sheet import MAX_TILES, Tile, draw_sheet


def sheet_of(
    hits: Sequence[Hit],
    *,
    title: str,
    whole: str,
    names: Sequence[str] = (),
    example: bytes | None = None,
) -> bytes:
    """A JPEG file of the first `MAX_TILES` hits; each name of the question has a colour of its own.

    Args:
        hits: Best first.
        title: What was asked.
        whole: What the hits are the best of: a number of images, and where.
        names: Of the question, in its order; those of the hits where they are left out.
        example: The picture that was asked with.
    """
    found_names = (found.name for hit in hits for found in hit.found if found.name)
    legend = list(dict.fromkeys([*names, *found_names]))
    if len(legend) < 2:
        legend = []
    with ThreadPoolExecutor(16) as readers:
        tiles = list(readers.map(lambda hit: _tile(hit, legend), hits[:MAX_TILES]))
    subtitle = f"the best {len(tiles)} of {whole}"
    return draw_sheet(tiles, title=title, subtitle=subtitle, example=example, legend=legend)


def read_example(uri: str) -> bytes:
    """The picture that is asked with.

    Raises:
        ConfigError: There is no such file, or it is not one.
        StorageError: The store refused.
    """
    try:
        return storage.read_image(uri, "")
    except DataError as error:
        raise ConfigError(f"the picture to look for cannot be read: {error}; give another one") from error


def check_sheet(path: Path) -> None:
    """Whether a sheet can be written there: to know it before the search.

    Raises:
        ConfigError: The name is not a JPEG's, or a folder's.
        StorageError: The folder is not writable.
    """
    if path.suffix.lower() not in {".jpg", ".jpeg"} or path.is_dir():
        raise ConfigError(f"--sheet {path}: a sheet is a JPEG file; end its name with .jpg")
    storage.check_writable(str(path.parent))


def _tile(hit: Hit, legend: Sequence[str]) -> Tile:
    name = hit.uri.rsplit("/", 1)[-1]
    more = tuple((legend.index(found.name), found.box) for found in hit.found) if legend else ()
    try:
        return Tile(name, storage.read_image(hit.uri, hit.etag), hit.box, hit.score, boxes=more)
    except storage.ObjectGone:
        problem = "gone since the index was built"
    except storage.ObjectChanged:
        problem = "changed since the index was built"
    except ForRayError as error:
        problem = f"cannot be read: {error}"
    return Tile(name, score=hit.score, problem=problem)
