"""The picture book's instances: one object in many views, for search of pictures by pictures.

    python -m for_ray.datasets.instances --out DIR --instances 200 --views 10 --split train|val

An instance is one drawing of a thing in one shade and one manner. Its views differ in size, tilt and
perspective, in light and noise, in what it stands on, and in what stands around it. Instances of `val` are of
the picture book's 65 categories, those of `train` of its other names: what is learnt must carry over to
things never seen. A view depends on the seed, the split, its instance and its number alone.

    DIR/images/00000-00.jpg    instance and view, 128 to 256 pixels
    DIR/captions.csv           `uri`, `caption`: two captions a view
    DIR/labels.csv             `uri`, `label`; written last, so where it lies the set is whole

As `labels:DIR/labels.csv` it is a data set with classes, as `pairs:DIR/captions.csv` one with captions.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from for_ray.datasets.backdrops import MOODS, background
from for_ray.datasets.glyphs import Glyph, family_glyphs, field_of
from for_ray.datasets.pages import CATEGORIES, STYLE, Split, other_names
from for_ray.datasets.scenes import COLOURS, SceneStyle, paint, place
from for_ray.errors import ConfigError, ForRayError

VIEW = SceneStyle(
    sizes=(0.35, 0.8), tilt_degrees=14, shear=0.12, perspective=0.15, stroke=STYLE.stroke, overlap=1.0
)
"""How far views of one instance differ."""

MOST_OTHERS = 3  # things that stand around an instance, smaller than it
OTHER_SIZES = (0.12, 0.3)


@dataclass(frozen=True)
class Instance:
    """One thing.

    Attributes:
        label: Its class: colour, name and which drawing, such as `red car` or `red car 2`.
        noun: What captions call it: colour and name.
        glyph: Its drawing.
        colour: One of `COLOURS`.
        seed: Of its shade and manner, the same in all views.
    """

    label: str
    noun: str
    glyph: Glyph
    colour: str
    seed: tuple[int, ...]


def instances_of(split: Split, count: int, *, seed: int = 0) -> list[Instance]:
    """The first `count` of a split's instances; more of them hold fewer.

    Raises:
        ConfigError: There are not so many, or `qtawesome` is missing.
    """
    names = CATEGORIES if split == "val" else other_names()
    glyphs = family_glyphs("material")
    known = [
        (name, number, colour) for name in names for number in range(len(glyphs[name])) for colour in COLOURS
    ]
    if not 1 <= count <= len(known):
        raise ConfigError(f"--instances must be 1 to {len(known):,} for {split}, got {count:,}")
    place_of_split = ("train", "val").index(split)
    chosen = np.random.default_rng([seed, place_of_split]).permutation(len(known))[:count]
    found = []
    for index in chosen.tolist():
        name, number, colour = known[index]
        noun = f"{colour} {name}"
        label = f"{noun} {number + 1}" if number else noun
        found.append(Instance(label, noun, glyphs[name][number], colour, (seed, place_of_split, index)))
    return found


def draw_view(instance: Instance, number: int) -> tuple[Image.Image, tuple[str, str]]:
    """One view of an instance and two captions of it; the same for the same arguments, on any machine."""
    rng = np.random.default_rng([*instance.seed, number, 1])
    width, height = (int(side) for side in rng.integers(128, 257, 2))
    mood = list(MOODS)[int(rng.integers(len(MOODS)))] if rng.random() < 0.5 else None
    canvas = background(rng, width, height, mood)
    others = [_draw_other(rng, canvas) for _ in range(int(rng.integers(MOST_OTHERS + 1)))]
    placement = place(rng, field_of(instance.glyph), min(width, height), VIEW)
    room = np.array([width - placement.width, height - placement.height])
    middle = np.array([width, height]) / 2 + rng.uniform(-0.45, 0.45, 2) * np.maximum(room, 0)
    placement = dataclasses.replace(placement, x=float(middle[0]), y=float(middle[1]))
    own = np.random.default_rng([*instance.seed, 2])  # shade, stroke and manner are the instance's own
    paint(canvas, own, field_of(instance.glyph), placement, instance.colour, VIEW.stroke)
    pixels = np.asarray(canvas, np.float32)
    light = rng.uniform(0.6, 1.25) * rng.uniform(0.92, 1.08, 3).astype(np.float32)  # with a tint
    noise = rng.standard_normal((height, width, 1), dtype=np.float32) * float(rng.uniform(0, 10))
    image = Image.fromarray(np.clip(pixels * light + noise, 0, 255).astype(np.uint8))
    noun = f"{'an' if instance.noun[0] in 'aeiou' else 'a'} {instance.noun}"
    alone = f"{noun} {mood}" if mood else noun
    return image, (alone, f"{noun} and {others[-1]}" if others else f"only {noun}")


def _draw_other(rng: np.random.Generator, canvas: Image.Image) -> str:
    """Something else in the scene; what captions call it."""
    names, glyphs, colours = other_names(), family_glyphs("material"), list(COLOURS)
    name, colour = names[int(rng.integers(len(names)))], colours[int(rng.integers(len(colours)))]
    field = field_of(glyphs[name][int(rng.integers(len(glyphs[name])))])
    placement = place(rng, field, min(canvas.size), VIEW, size=float(rng.uniform(*OTHER_SIZES)))
    x, y = (float(rng.uniform(0.1, 0.9) * side) for side in canvas.size)
    paint(canvas, rng, field, dataclasses.replace(placement, x=x, y=y), colour, VIEW.stroke)
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {name}"


def write_instances(
    out: Path, *, instances: int, views: int, split: Split, seed: int = 0, processes: int | None = None
) -> Path:
    """Draw a set into a folder that is new, empty, or holds the same one.

    Args:
        out: The folder.
        instances: How many.
        views: Of each.
        split: `train` or `val`; they share no name.
        seed: Another one draws another set.
        processes: How many draw; one for each core that this process may use when it is left out.

    Returns:
        The path of `labels.csv`. A set that is there already, whole and of the same settings, stays.

    Raises:
        ConfigError: A number is out of range, the folder holds something else or cannot be written, or
            `qtawesome` is missing.
    """
    if views < 1 or seed < 0:
        raise ConfigError(f"--views must be at least 1 and --seed 0, got {views} and {seed}")
    settings = {"instances": instances, "views": views, "split": split, "seed": seed}
    labels, marker = out / "labels.csv", out / "instances.json"
    try:
        if out.exists() and any(out.iterdir()):
            if not marker.is_file() or json.loads(marker.read_text(encoding="utf-8")) != settings:
                raise ConfigError(f"{out} holds something else; give a new or empty folder")
            if labels.is_file():
                return labels
        chosen = instances_of(split, instances, seed=seed)
        (out / "images").mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps(settings), encoding="utf-8")
        rows = _draw_all(out / "images", chosen, views, processes or len(os.sched_getaffinity(0)))
        _write_table(
            out / "captions.csv", "caption", [(uri, text) for uri, _, texts in rows for text in texts]
        )
        _write_table(labels, "label", [(uri, label) for uri, label, _ in rows])
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error}; give a folder that can be written") from error
    return labels


Row = tuple[str, str, tuple[str, str]]  # uri, label, captions


def _draw_all(folder: Path, chosen: list[Instance], views: int, processes: int) -> list[Row]:
    other_names()  # before forking: reading the names takes seconds
    draw = functools.partial(_draw_instance, folder, views)
    numbered = list(enumerate(chosen))
    if min(processes, len(chosen)) == 1:
        return [row for rows in map(draw, numbered) for row in rows]
    with multiprocessing.get_context("fork").Pool(min(processes, len(chosen))) as pool:
        return [row for rows in pool.imap(draw, numbered, chunksize=4) for row in rows]


def _draw_instance(folder: Path, views: int, numbered: tuple[int, Instance]) -> list[Row]:
    index, instance = numbered
    rows = []
    for number in range(views):
        image, captions = draw_view(instance, number)
        file_name = f"{index:05d}-{number:02d}.jpg"
        image.save(folder / file_name, "JPEG", quality=80)
        rows.append((f"images/{file_name}", instance.label, captions))
    return rows


def _write_table(path: Path, column: str, rows: Iterable[tuple[str, str]]) -> None:
    """Write a table of uris and something else, whole or not at all."""
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["uri", column])
        writer.writerows(rows)
    part.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 where the settings are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m for_ray.datasets.instances", description="Draw the picture book's instances."
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder that is new or empty")
    parser.add_argument("--instances", type=int, required=True, help="how many things")
    parser.add_argument("--views", type=int, required=True, help="images of each")
    parser.add_argument(
        "--split", choices=("train", "val"), required=True, help="two sets that share no name"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed draws another set (default 0)")
    options = parser.parse_args(arguments)
    try:
        path = write_instances(
            options.out,
            instances=options.instances,
            views=options.views,
            split=options.split,
            seed=options.seed,
        )
    except ForRayError as error:
        print(f"instances: {error}", file=sys.stderr)  # noqa: T201  # a command's own words
        return 2
    print(f"{options.instances} instances in {options.views} views each: {path}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
