"""The picture book: a data set with boxes and captions that the package draws itself, as large as you like.

    python -m for_ray.datasets.picturebook --out DIR --images 1000 --split train|val

Scenes of three to nine objects, drawn with the glyphs of Material Design Icons. 65 categories are annotated,
48 base and 17 novel; every other name that the font draws appears as well, unannotated. An image depends on
the seed, the split and its own index alone, so any number of processes writes the same bytes.

    DIR/images/000000.jpg    the scenes, 160 to 320 pixels
    DIR/captions.jsonl       one line an image: its file name and two captions that name some of its objects
    DIR/split.json           the names of the base and the novel categories
    DIR/annotations.json     COCO's format; written last, so where it lies the set is whole
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from for_ray.datasets.glyphs import family_glyphs
from for_ray.datasets.pages import (
    BASE,
    CATEGORIES,
    LEAST_VISIBLE,
    NOVEL,
    SceneObject,
    Split,
    draw_page,
    other_names,
)
from for_ray.errors import ConfigError, ForRayError

SPOOLED = ("images", "annotations")  # COCO's lists that grow with the data set


def write_picturebook(
    out: Path, *, images: int, split: Split, seed: int = 0, processes: int | None = None
) -> Path:
    """Draw a data set into a folder that is new, empty, or holds the same one.

    Args:
        out: The folder.
        images: How many to draw.
        split: `train` or `val`; they share no image.
        seed: Another one draws another set.
        processes: How many draw; one for each core that this process may use when it is left out.

    Returns:
        The path of `annotations.json`. A set that is there already, whole and of the same settings, stays.

    Raises:
        ConfigError: `images` or `processes` is below 1, the folder holds something else or cannot be written,
            or `qtawesome` is missing.
    """
    processes = len(os.sched_getaffinity(0)) if processes is None else processes
    if images < 1 or processes < 1 or seed < 0:
        raise ConfigError(
            f"--images and --processes must be at least 1 and --seed 0, got {images}, {processes}, {seed}"
        )
    settings = {"images": images, "split": split, "seed": seed}
    annotations = out / "annotations.json"
    try:
        if _is_drawn(out, settings):
            return annotations
        (out / "images").mkdir(parents=True, exist_ok=True)
        _write_json(out / "picturebook.json", settings)
        _write_lines(out, _draw_all(out, images, split, seed, processes))
        _write_json(out / "split.json", {"base": list(BASE), "novel": list(NOVEL)})
        _join_lines(out, settings)
    except OSError as error:
        raise ConfigError(
            f"cannot write the picture book to {out}: {error}; give a folder that can be written"
        ) from error
    return annotations


def _is_drawn(out: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds this very set, whole.

    Raises:
        ConfigError: It holds another, or something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    marker = out / "picturebook.json"
    if not marker.is_file():
        raise ConfigError(f"{out} exists and holds no picture book; give a new or empty folder")
    held = json.loads(marker.read_text(encoding="utf-8"))
    if held != settings:
        raise ConfigError(
            f"{out} holds a picture book of {held}, not {settings}; give a new folder or remove this one"
        )
    return (out / "annotations.json").is_file()


def _draw_all(out: Path, images: int, split: Split, seed: int, processes: int) -> Iterator[dict[str, Any]]:
    """Draw every page, in this process or several, and give the records in the order of the images."""
    family_glyphs("material"), other_names()  # before forking: reading the names takes seconds
    draw = functools.partial(_save_page, out / "images", split, seed)
    if min(processes, images) == 1:
        yield from map(draw, range(images))
        return
    with multiprocessing.get_context("fork").Pool(min(processes, images)) as pool:
        yield from pool.imap(draw, range(images), chunksize=16)


def _save_page(folder: Path, split: Split, seed: int, index: int) -> dict[str, Any]:
    """Draw one page, write its JPEG, and return what the annotations need."""
    page = draw_page(seed, split, index)
    file_name = f"{index:06d}.jpg"
    quality = int(np.random.default_rng([seed, index, 7]).integers(55, 93))
    page.image.save(folder / file_name, "JPEG", quality=quality)
    objects = [each for each in page.objects if each.visible >= LEAST_VISIBLE and each.name in CATEGORIES]
    size = {"width": page.image.width, "height": page.image.height}
    return {"file_name": file_name, **size, "captions": page.captions, "objects": objects}


def _write_lines(out: Path, pages: Iterator[dict[str, Any]]) -> None:
    """Write captions, and COCO's images and annotations, one a line as they come: memory stays flat.

    The ids of images and annotations count from 1, in the order of the images.
    """
    names = ("captions.jsonl", *(f"{key}.lines" for key in SPOOLED))
    annotation_ids = itertools.count(1)
    with contextlib.ExitStack() as stack:
        captions, images, annotations = (
            stack.enter_context((out / name).open("w", encoding="utf-8")) for name in names
        )
        for image_id, page in enumerate(pages, start=1):
            captions.write(json.dumps({key: page[key] for key in ("file_name", "captions")}) + "\n")
            record = {"id": image_id, **{key: page[key] for key in ("file_name", "width", "height")}}
            images.write(json.dumps(record) + "\n")
            for each in page["objects"]:
                annotations.write(json.dumps(_annotation(next(annotation_ids), image_id, each)) + "\n")


def _annotation(annotation_id: int, image_id: int, seen: SceneObject) -> dict[str, Any]:
    """COCO's record of an object."""
    return {
        "id": annotation_id, "image_id": image_id, "category_id": CATEGORIES.index(seen.name) + 1,
        "bbox": list(seen.box), "area": seen.area, "iscrowd": 0, "visible": round(seen.visible, 3),
    }  # fmt: skip


def _join_lines(out: Path, settings: dict[str, Any]) -> None:
    """Make `annotations.json` of what `_write_lines` left, a line at a time, whole or not at all."""
    categories = [
        {"id": index, "name": name, "supercategory": "base" if name in BASE else "novel"}
        for index, name in enumerate(CATEGORIES, start=1)
    ]
    part = out / "annotations.part"
    with part.open("w", encoding="utf-8") as whole:
        whole.write(f'{{"info": {json.dumps(settings)},\n"categories": {json.dumps(categories)}')
        for key in SPOOLED:
            whole.write(f',\n"{key}": [')
            with (out / f"{key}.lines").open(encoding="utf-8") as lines:
                for number, line in enumerate(lines):
                    whole.write((",\n" if number else "\n") + line.rstrip("\n"))
            whole.write("]")
        whole.write("}\n")
    for key in SPOOLED:
        (out / f"{key}.lines").unlink()
    part.replace(out / "annotations.json")


def _write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    path.with_suffix(".part").write_text(json.dumps(content), encoding="utf-8")
    path.with_suffix(".part").replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 where the settings are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m for_ray.datasets.picturebook", description="Draw the picture book."
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder that is new or empty")
    parser.add_argument("--images", type=int, required=True, help="how many to draw")
    parser.add_argument(
        "--split", choices=("train", "val"), required=True, help="two sets that share no image"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed draws another set (default 0)")
    parser.add_argument(
        "--processes", type=int, help="how many draw (default: one a core); the images do not depend on it"
    )
    options = parser.parse_args(arguments)
    try:
        path = write_picturebook(
            options.out,
            images=options.images,
            split=options.split,
            seed=options.seed,
            processes=options.processes,
        )
    except ForRayError as error:
        print(f"picturebook: {error}", file=sys.stderr)  # noqa: T201  # a command's own words
        return 2
    print(f"{options.images} images, annotations in {path}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
