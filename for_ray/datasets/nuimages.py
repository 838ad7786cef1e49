"""nuImages: driving scenes, in tables of JSON. Only key frames are annotated, and only they are images here.

    ROOT/VERSION/sample.json        key_camera_token: which sample_data is the key frame
    ROOT/VERSION/sample_data.json   token, filename (`samples/CAM_FRONT/….jpg`)
    ROOT/VERSION/object_ann.json    sample_data_token, category_token
    ROOT/VERSION/category.json      token, name (`vehicle.bus.rigid`)

The format: nuscenes-devkit, docs/schema_nuimages.md. Its 23 object categories become 18: the ten of nuScenes'
detection task, and the rest, which are rare. `emergency vehicle` is police cars and ambulances, whether their
lights flash or not (`attribute.json` says that, and is not read).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from for_ray import storage
from for_ray.datasets.coco import uris_below
from for_ray.datasets.labelled import LabelledImages, Ragged
from for_ray.datasets.split import Split, arrange, listed, repeated
from for_ray.datasets.streams import Integers, Record, Strings, stream_json, text
from for_ray.errors import DataError
from for_ray.storage import join_uri, shown

BASE = {
    "barrier": ("movable_object.barrier",),
    "bicycle": ("vehicle.bicycle",),
    "bus": ("vehicle.bus.bendy", "vehicle.bus.rigid"),
    "car": ("vehicle.car",),
    "construction vehicle": ("vehicle.construction",),
    "motorcycle": ("vehicle.motorcycle",),
    "pedestrian": (
        "human.pedestrian.adult",
        "human.pedestrian.child",
        "human.pedestrian.construction_worker",
        "human.pedestrian.police_officer",
    ),
    "traffic cone": ("movable_object.trafficcone",),
    "trailer": ("vehicle.trailer",),
    "truck": ("vehicle.truck",),
}
"""The ten classes of nuScenes' detection task, and nuImages' names for them."""

NOVEL = {
    "animal": ("animal",),
    "personal mobility": ("human.pedestrian.personal_mobility",),
    "stroller": ("human.pedestrian.stroller",),
    "wheelchair": ("human.pedestrian.wheelchair",),
    "debris": ("movable_object.debris",),
    "pushable pullable": ("movable_object.pushable_pullable",),
    "bicycle rack": ("static_object.bicycle_rack",),
    "emergency vehicle": ("vehicle.emergency.ambulance", "vehicle.emergency.police"),
}
"""The other eight. FOR names none of its novel categories, but says that each is in under 5 % of images."""

SURFACES = ("flat.", "vehicle.ego")
"""How the names of what is no object begin."""

DEFAULT_SPLIT = Split(tuple(BASE), tuple(NOVEL), "nuImages (10/8)")


def read_nuimages(root: str, version: str, split: Split | None, *, name: str) -> LabelledImages:
    """Read nuImages' tables; the images are the key frames of the cameras, in the order of their tokens.

    Args:
        root: The folder or prefix that holds the tables' folder and `samples/`.
        version: The tables' folder: `v1.0-train`, `v1.0-val`, `v1.0-mini`.
        split: Without one, the detection classes are base and all others novel.
        name: What messages call the set.

    Raises:
        ConfigError: The split does not fit.
        DataError: A table is missing, is not nuImages', contradicts another, or holds nothing.
        StorageError: The store refused.
    """
    tables = _Tables(join_uri(root, version))
    frames = tables.key_frames()
    place_of = tables.place_of_category()
    categories, is_novel, used = arrange(
        [*BASE, *NOVEL], split.spaced() if split else DEFAULT_SPLIT, tables.source
    )
    rows, places = tables.annotations(frames.row_of, place_of)
    columns = used[places]
    is_used = columns >= 0
    folder = _common_folder(frames.file_names)
    uris = uris_below(storage.canonical_uri(root), frames.file_names, tables.source)
    return LabelledImages(
        name=name,
        uris=uris,
        categories=categories,
        is_novel=is_novel,
        labels=Ragged.of_pairs(rows[is_used], columns[is_used], len(uris)),
        images_uri=storage.canonical_uri(join_uri(root, folder) if folder else root),
    )


@dataclass
class _Frames:
    """The key frames: the row of each token, and the files in that order."""

    row_of: dict[str, int] = field(default_factory=dict)
    file_names: pa.ChunkedArray = field(default_factory=lambda: pa.chunked_array([], pa.string()))


class _Tables:
    """One version's tables, streamed one after the other."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self.source = shown(uri)

    def key_frames(self) -> _Frames:
        """The key frames of the cameras, by token."""
        wanted: set[str] = set()
        where = f"a row of {self.source}/sample.json"
        self._read("sample", lambda row: wanted.add(text(row, "key_camera_token", where)))
        names = self._file_names(wanted)
        tokens = sorted(names)
        strings = Strings()
        for token in tokens:
            strings.add(names.pop(token))
        return _Frames({token: row for row, token in enumerate(tokens)}, strings.column())

    def _file_names(self, wanted: set[str]) -> dict[str, str]:
        where = f"a row of {self.source}/sample_data.json"
        names: dict[str, str] = {}

        def add(row: Record) -> None:
            token = text(row, "token", where)
            if token not in wanted:  # sweeps, and key frames of the lidar
                return
            if token in names:
                raise DataError(f"{self.source}/sample_data.json has several rows of token {token}")
            names[token] = text(row, "filename", where)

        self._read("sample_data", add)
        if missing := wanted - names.keys():
            raise DataError(
                f"{self.source} is inconsistent: the key frames of {len(missing):,} samples are not in "
                f"sample_data.json ({min(missing)}); restore the tables"
            )
        return names

    def place_of_category(self) -> dict[str, int]:
        """By token: the place among BASE and NOVEL, -1 of a surface."""
        groups = [*BASE.values(), *NOVEL.values()]
        place_of_name = {name: place for place, names in enumerate(groups) for name in names}
        where = f"a row of {self.source}/category.json"
        names: dict[str, str] = {}

        def add(row: Record) -> None:
            token = text(row, "token", where)
            if token in names:
                raise DataError(f"{self.source}/category.json has several rows of token {token}")
            names[token] = text(row, "name", where)

        self._read("category", add)
        if twice := repeated(names.values()):
            raise DataError(
                f"{self.source}/category.json has several categories of one name: {listed(twice)}"
            )
        unknown = sorted(
            name for name in names.values() if name not in place_of_name and not name.startswith(SURFACES)
        )
        if unknown:
            raise DataError(
                f"{self.source}/category.json is not nuImages': it has no category {listed(unknown)}; for "
                "other data sets give coco:ANNOTATIONS.json:IMAGES and --split"
            )
        return {token: place_of_name.get(name, -1) for token, name in names.items()}

    def annotations(
        self, row_of: dict[str, int], place_of: dict[str, int]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row and category of each annotated object; an object twice in an image is there twice."""
        rows, places = Integers(), Integers()
        where = f"a row of {self.source}/object_ann.json"

        def add(record: Record) -> None:
            frame, category = text(record, "sample_data_token", where), text(record, "category_token", where)
            if frame not in row_of or category not in place_of:
                kind, token = ("frame", frame) if frame not in row_of else ("category", category)
                raise DataError(
                    f"{self.source} is inconsistent: object_ann.json names the {kind} {token}, which is "
                    "not there; restore the tables"
                )
            if place_of[category] >= 0:
                rows.add(row_of[frame])
                places.add(place_of[category])

        self._read("object_ann", add)
        return rows.column(), places.column()

    def _read(self, table: str, add: Callable[[Record], None]) -> None:
        num_rows = 0

        def count(record: Record) -> None:
            nonlocal num_rows
            num_rows += 1
            add(record)

        uri = join_uri(self._uri, f"{table}.json")
        stream_json(uri, {"item": count}, top="[")
        if not num_rows:
            raise DataError(f"{shown(uri)} has no rows; nuImages' test version has no annotations")


def _common_folder(file_names: pa.ChunkedArray) -> str:
    """The first part of the paths where all share it (`samples`): what a listing need not go beyond."""
    first = {
        name.split("/", 1)[0] for chunk in file_names.chunks for name in chunk.to_pylist() if "/" in name
    }
    has_others = any("/" not in name for chunk in file_names.chunks for name in chunk.to_pylist())
    return first.pop() if len(first) == 1 and not has_others else ""
