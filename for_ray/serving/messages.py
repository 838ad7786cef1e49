"""What is sent to the service, and what it sends back; OpenAPI shows these."""

from __future__ import annotations

import base64
import binascii
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from for_ray.errors import ConfigError
from for_ray.retrieval import MAX_HITS, Filters, Question
from for_ray.retrieval.filters import MAX_FILTER_LETTERS
from for_ray.retrieval.grammar import MAX_LETTERS
from for_ray.serving.conditions import check_condition

MAX_K = 1000
"""Hits of an answer; an export has up to `retrieval.MAX_HITS`."""

MAX_FILTER_IDS = 100_000
"""In a filter."""

MAX_IMAGE_ID = (1 << 55) - 1


def _clean(text: str) -> str:
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("has letters that no text has: NUL, or half of a pair")
    return text


Line = Annotated[str, AfterValidator(_clean)]
ImageId = Annotated[int, Field(strict=True, ge=0, le=MAX_IMAGE_ID)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
Cosine = Annotated[float, Field(strict=True, ge=-1, le=1)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FiltersBody(_Message):
    """Which images may be found; all that are given must hold."""

    under: Line | None = Field(None, min_length=1, max_length=MAX_FILTER_LETTERS)
    glob: Line | None = Field(None, min_length=1, max_length=MAX_FILTER_LETTERS)
    where: Line | None = Field(
        None, min_length=1, max_length=MAX_FILTER_LETTERS, description="SQL over the index's columns"
    )
    image_ids: list[ImageId] | None = Field(None, max_length=MAX_FILTER_IDS)

    def filters(self) -> Filters:
        """As the index takes them.

        Raises:
            ConfigError: The condition is not one that is served.
        """
        ids = None if self.image_ids is None else tuple(self.image_ids)
        where = None if self.where is None else check_condition(self.where)
        return Filters(self.under, self.glob, where, ids)


class QuestionBody(_Message):
    """One thing to look for: words, a picture, or an object of the index."""

    text: Line | None = Field(None, description=f"words, at most {MAX_LETTERS:,} letters")
    image: str | None = Field(
        None, description="an image file in base64", json_schema_extra={"format": "byte"}
    )
    like: Line | None = Field(None, max_length=32, description="IMAGE_ID:SLOT, or IMAGE_ID for all it shows")
    region: tuple[Fraction, Fraction, Fraction, Fraction] | None = Field(
        None,
        description="of the picture, or of the image that `like` names: x0, y0, x1, y1 as fractions of its "
        "width and height",
    )
    k: int = Field(60, strict=True, ge=1, le=MAX_K)
    filters: FiltersBody = FiltersBody()
    min_score: Cosine | None = None
    fold_at: Fraction | None = Field(None, description="images as similar as this are one hit")
    unwanted_above: Cosine | None = Field(None, description="cosine from which an image shows what NOT names")
    page: Line | None = Field(None, max_length=1000, description="`next_page` of the answer before")
    snapshot_id: int | None = Field(
        None, strict=True, ge=1, lt=1 << 53, description="that has to answer; the current one where left out"
    )

    def question(self) -> Question:
        """As the index takes it.

        Raises:
            ConfigError: The picture is not in base64, or the condition is not one that is served.
        """
        return Question(
            text=self.text,
            image=None if self.image is None else _decoded(self.image),
            region=self.region,
            like=self.like,
            k=self.k,
            filters=self.filters.filters(),
            min_score=self.min_score,
            fold_at=self.fold_at,
            unwanted_above=self.unwanted_above,
            page=self.page,
        )


class ExportQuestion(QuestionBody):
    """As for a search, with more hits."""

    k: int = Field(60, strict=True, ge=1, le=MAX_HITS)


class ExportBody(_Message):
    """Which hits to take along, and how they are written."""

    format: Literal["csv", "jsonl", "coco"]
    question: ExportQuestion
    image_ids: list[ImageId] | None = Field(
        None, max_length=MAX_HITS, description="only these of the question's hits, whatever its k and page"
    )

    def chosen(self) -> Question:
        """The question whose hits are exported.

        Raises:
            ConfigError: The picture is not in base64, or the condition is not one that is served.
        """
        question = self.question.question()
        if self.image_ids is None:
            return question
        allowed, chosen = question.filters.image_ids, set(self.image_ids)
        both = chosen if allowed is None else chosen & set(allowed)
        filters = replace(question.filters, image_ids=tuple(sorted(both)))
        return replace(question, k=max(len(both), 1), page=None, filters=filters)


class SessionBody(_Message):
    """The token, for a cookie in its place."""

    token: str = Field(max_length=1000)


class FoundBody(BaseModel):
    """What stands for one name of a question in an image."""

    name: str
    score: float
    slot: int
    box: tuple[float, float, float, float]


class HitBody(BaseModel):
    """One image of an answer; boxes are fractions of its width and height."""

    uri: str
    score: float
    image_id: int
    slot: int
    box: tuple[float, float, float, float]
    found: list[FoundBody]
    folded: list[str]
    width: int | None
    height: int | None


class AnswerBody(BaseModel):
    """What one snapshot answers, the best hit first."""

    hits: list[HitBody]
    names: list[str]
    snapshot_id: int
    num_looked_at: int
    is_complete: bool
    is_exhaustive: bool
    is_proven: bool
    reason: str | None
    next_page: str | None
    seconds: dict[str, float]


class SlotBody(BaseModel):
    """One of an image's vectors, and what it speaks for."""

    slot: int
    box: tuple[float, float, float, float]


class ObjectsBody(BaseModel):
    """What the index holds of an image."""

    image_id: int
    uri: str
    etag: str
    width: int | None
    height: int | None
    snapshot_id: int
    slots: list[SlotBody]
    columns: dict[str, Any]


class SnapshotBody(BaseModel):
    """A published state of the index."""

    snapshot_id: int
    created_at: str
    encoder: str
    indexed: int
    vectors: int
    recall: float | None


class SnapshotsBody(BaseModel):
    """The states that there are, the newest first."""

    current: int
    snapshots: list[SnapshotBody]


class AboutBody(BaseModel):
    """What is served."""

    name: str
    snapshot_id: int
    created_at: str
    num_images: int
    num_vectors: int
    encoder: str
    head: str
    columns: list[str]
    examples: list[str]
    limits: dict[str, float]


class HealthBody(BaseModel):
    """Whether questions are answered; `stale` says why a newer snapshot could not be taken."""

    status: Literal["ok", "unwell"]
    snapshot_id: int
    age_seconds: int
    stale: str | None


class ErrorBody(BaseModel):
    """Why not: one line, a word for programs, and the letter of the question that it is about."""

    error: str
    code: str
    position: int | None = None


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ConfigError(
            "the image is not in base64: send the file's bytes encoded so, and nothing else"
        ) from None
