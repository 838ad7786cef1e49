"""What the client of the search service makes of its answers' JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Found:
    """What stands for one name of a question in an image: as `retrieval.Found`."""

    name: str
    score: float
    slot: int
    box: Box


@dataclass(frozen=True)
class Hit:
    """One image of an answer: as `retrieval.Hit`, and the upright image's pixels where they are known."""

    uri: str
    score: float
    image_id: int
    slot: int
    box: Box
    found: tuple[Found, ...]
    folded: tuple[str, ...]
    width: int | None
    height: int | None


@dataclass(frozen=True)
class Answer:
    """What the current snapshot answers to a question: as `retrieval.Answer`."""

    hits: tuple[Hit, ...]
    names: tuple[str, ...]
    snapshot_id: int
    num_looked_at: int
    is_complete: bool
    is_exhaustive: bool
    is_proven: bool
    reason: str | None
    next_page: str | None
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Slot:
    """One stored vector of an image, by what it speaks for."""

    slot: int
    box: Box


@dataclass(frozen=True)
class ImageObjects:
    """What the index holds of an image; `columns` are those of the manifest."""

    image_id: int
    uri: str
    etag: str
    width: int | None
    height: int | None
    snapshot_id: int
    slots: tuple[Slot, ...]
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class PublishedSnapshot:
    """One published state of the index; `recall` is None where it was not measured."""

    snapshot_id: int
    created_at: str
    encoder: str
    indexed: int
    vectors: int
    recall: float | None


def read_answer(found: Mapping[str, Any]) -> Answer:
    """Of POST /search; a `KeyError` or `TypeError` where it is none, as of the others."""
    hits = tuple(_hit(each) for each in found["hits"])
    return Answer(**{**_known(Answer, found), "hits": hits, "names": tuple(found["names"])})


def _hit(found: Mapping[str, Any]) -> Hit:
    objects = tuple(Found(**{**_known(Found, each), "box": _box(each["box"])}) for each in found["found"])
    given = {"box": _box(found["box"]), "found": objects, "folded": tuple(found["folded"])}
    return Hit(**{**_known(Hit, found), **given})


def read_objects(found: Mapping[str, Any]) -> ImageObjects:
    """Of GET /images/{id}/objects."""
    slots = tuple(Slot(each["slot"], _box(each["box"])) for each in found["slots"])
    return ImageObjects(**{**_known(ImageObjects, found), "slots": slots})


def read_snapshots(found: Mapping[str, Any]) -> tuple[PublishedSnapshot, ...]:
    """Of GET /snapshots."""
    return tuple(PublishedSnapshot(**_known(PublishedSnapshot, each)) for each in found["snapshots"])


def _known(kind: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass; what a newer service says besides is left out."""
    return {name: found.get(name) for name in kind.__dataclass_fields__}


def _box(sides: Sequence[float]) -> Box:
    x0, y0, x1, y1 = sides
    return x0, y0, x1, y1
