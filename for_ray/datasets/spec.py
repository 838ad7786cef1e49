"""Data sets by one word on the command line: `KIND:WHERE`.

    coco:ANNOTATIONS.json:IMAGES     COCO 2014 and 2017, and any file in its format
    lvis:ANNOTATIONS.json:IMAGES     LVIS v1; IMAGES holds train2017/ and val2017/
    nuimages:ROOT:VERSION            nuImages; ROOT holds VERSION/ and samples/
    picturebook:DIR                  what `python -m for_ray.datasets.picturebook` draws
    folder:DIR                       folders of images that are named after classes
    labels:FILE.csv|.tsv|.parquet    a table of `uri` and `label`

Each place is a path or `s3://bucket/…`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import PurePosixPath

from for_ray.datasets.classes import read_class_folders, read_class_table
from for_ray.datasets.coco import read_coco
from for_ray.datasets.labelled import LabelledImages
from for_ray.datasets.lvis import read_lvis
from for_ray.datasets.nuimages import read_nuimages
from for_ray.datasets.split import Split, read_split
from for_ray.errors import ConfigError, DataError
from for_ray.storage import exists, join_uri, shown

FORMS = {
    "coco": "coco:ANNOTATIONS.json:IMAGES",
    "lvis": "lvis:ANNOTATIONS.json:IMAGES",
    "nuimages": "nuimages:ROOT:VERSION",
    "picturebook": "picturebook:DIR",
    "folder": "folder:DIR",
    "labels": "labels:FILE",
}


def open_dataset(spec: str, *, split: str | None = None) -> LabelledImages:
    """Read the annotations of a data set; no image is touched.

    Args:
        spec: As this module says.
        split: A JSON file `{"base": [names], "novel": [names]}`. By default: COCO-OVD's for COCO, rare
            categories as novel for LVIS, detection classes as base for nuImages, the picture book's own, all
            as base for class folders and tables.

    Raises:
        ConfigError: The spec or the split is wrong, or a split is needed.
        DataError: The annotations are not of this format, contradict themselves, or are not there.
        StorageError: The store refused.
    """
    kind, _, places = spec.partition(":")
    if kind not in FORMS or not places:
        raise ConfigError(f"no such data set: {spec!r}; expected {', '.join(FORMS.values())}")
    return _READERS[kind](places, read_split(split) if split else None)


def _open_coco(places: str, split: Split | None) -> LabelledImages:
    annotations, images = _two_places("coco", places)
    return read_coco(annotations, images, split, name=f"coco {_stem(annotations)}")


def _open_lvis(places: str, split: Split | None) -> LabelledImages:
    annotations, images = _two_places("lvis", places)
    return read_lvis(annotations, images, split, name=f"lvis {_stem(annotations)}")


def _open_nuimages(places: str, split: Split | None) -> LabelledImages:
    root, _, version = places.rpartition(":")
    if not root or not version or "/" in version:
        raise ConfigError(f"nuimages:{places} is incomplete; expected {FORMS['nuimages']}")
    return read_nuimages(root, version, split, name=f"nuimages {version}")


def _open_picturebook(folder: str, split: Split | None) -> LabelledImages:
    annotations, images = join_uri(folder, "annotations.json"), join_uri(folder, "images")
    if not exists(annotations):
        raise DataError(
            f"there is no picture book in {shown(folder)}: no annotations.json; draw one: "
            "python -m for_ray.datasets.picturebook --out DIR --images 1000 --split val"
        )
    split = split or read_split(join_uri(folder, "split.json"))
    return read_coco(annotations, images, split, name=f"picturebook {_stem(folder)}")


def _open_folder(folder: str, split: Split | None) -> LabelledImages:
    return read_class_folders(folder, split, name=f"folder {_stem(folder)}")


def _open_labels(table: str, split: Split | None) -> LabelledImages:
    return read_class_table(table, split, name=f"labels {_stem(table)}")


_READERS: dict[str, Callable[[str, Split | None], LabelledImages]] = {
    "coco": _open_coco,
    "lvis": _open_lvis,
    "nuimages": _open_nuimages,
    "picturebook": _open_picturebook,
    "folder": _open_folder,
    "labels": _open_labels,
}


def _two_places(kind: str, places: str) -> tuple[str, str]:
    """Both sides of the one colon that is none of a scheme; of several, of that after `.json`."""
    colons = [match.start() for match in re.finditer(r":(?!//)", places)]
    if len(colons) > 1:
        colons = [at for at in colons if places[:at].endswith(".json")]
    if len(colons) != 1 or not places[: colons[0]] or not places[colons[0] + 1 :]:
        raise ConfigError(f"{kind}:{places} does not name two places; expected {FORMS[kind]}")
    return places[: colons[0]], places[colons[0] + 1 :]


def _stem(uri: str) -> str:
    return PurePosixPath(uri.rstrip("/")).stem
