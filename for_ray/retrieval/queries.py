"""A question → vectors to search with, and from which score on an image shows what a NOT rules out."""

from __future__ import annotations

import hashlib
import re
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from for_ray.errors import ConfigError, DataError
from for_ray.index.search import ImageVectors
from for_ray.retrieval.grammar import parse
from for_ray.retrieval.names import NameVectors
from for_ray.retrieval.question import MAX_HITS, Query, Question
from for_ray.retrieval.rows import take_objects, take_vectors
from for_ray.schema import unpack_boxes
from for_ray.sheet import Box

if TYPE_CHECKING:
    from for_ray.model.encoder import Encoder

LIMIT_SPREADS = 3.0
"""How far above the lower quartile of the index's scores the limit of a NOT lies, in spreads below it."""

MAX_OFF_LENGTH = 0.01
"""By which the length of a unit vector may differ from 1: it may have been kept as float16."""

_LIKE = re.compile(r"([0-9]{1,18})(?::([0-9]{1,3}))?")


class PictureError(DataError):
    """The picture that is asked with can't be decoded."""


def check_question(question: Question) -> None:
    """Whether a question can be asked at all, of any index.

    Raises:
        ConfigError: It asks for nothing or for two things, or a number is out of range.
        QuestionError: The words don't parse.
    """
    asked = [question.text, question.image, question.like]
    if sum(each is not None for each in asked) != 1:
        raise ConfigError("a search takes words, a picture, or an object of the index: give one of them")
    check_count(question.k)
    if question.region is not None:
        _check_region(question)
    for name, value, lowest in (
        ("the lowest score", question.min_score, -1.0),
        ("the similarity to fold at", question.fold_at, 0.0),
        ("the score that a NOT rules out", question.unwanted_above, -1.0),
    ):
        if value is not None and not lowest <= value <= 1.0:
            raise ConfigError(f"{name} lies in {lowest:g} to 1, got {value:g}: give a cosine")
    if question.text is not None:
        parse(question.text)


def check_count(k: int) -> None:
    """Whether so many images can be asked for.

    Raises:
        ConfigError: They can't.
    """
    if not (isinstance(k, Integral) and 1 <= k <= MAX_HITS):
        got = f"{k:,}" if isinstance(k, Real) else repr(k)
        raise ConfigError(
            f"a search ranks 1 to {MAX_HITS:,} images, got {got}: ask for a whole number of them"
        )


def check_vector(query: NDArray[np.floating], *, dim: int) -> NDArray[np.float32]:
    """A vector to search with, as the index takes it.

    Raises:
        ConfigError: It has not the encoder's dimension, or not the length 1.
    """
    vector = np.asarray(query, np.float32)
    expected = f"a search takes a unit vector of {dim:,} numbers, as the index's encoder makes them"
    if vector.shape != (dim,):
        raise ConfigError(f"{expected}, got the shape {list(vector.shape)}: give one of these")
    length = float(np.linalg.norm(vector))
    if not abs(length - 1) <= MAX_OFF_LENGTH:
        raise ConfigError(f"{expected}, got the length {length:g}: divide it by its length")
    return vector


def text_query(text: str, texts: NameVectors) -> Query:
    """The names of a question through the encoder's prompts."""
    parsed = parse(text)
    clauses = tuple((clause.wanted, clause.unwanted) for clause in parsed.clauses)
    return Query(texts.embed(parsed.names), parsed.names, clauses)


def picture_query(image: bytes, region: Box | None, texts: NameVectors) -> Query:
    """All vectors of a picture; with a region the one whose box fits it best.

    The picture is encoded whole in both cases: on the picture book (2,500 images, 150 regions) the slot with
    the best fit finds the same category with a precision of 0.49 in the first 10; a crop, with as much around
    it as is best, of 0.44, and of 0.12 with nothing around it.

    What a picture gave before is not encoded again.

    Raises:
        PictureError: The picture can't be decoded.
    """
    encoder, digest = texts.encoder, hashlib.sha256(image).hexdigest()
    try:
        if region is None:
            (vectors,) = texts.pictures.get((digest, "whole"), lambda: (encoder.embed_image(image),))
            return Query(vectors)
        vectors, boxes = texts.pictures.get((digest, "objects"), lambda: _objects_of_picture(image, encoder))
    except DataError as error:
        raise PictureError(f"the picture to look for can't be decoded: {error}; give another one") from error
    return Query(vectors[[int(np.argmax(overlaps(boxes, region)))]])


def like_query(like: str, region: Box | None, images: Any) -> Query:
    """The stored vectors of an image, or one of them; with a region the one whose stored box fits it best.

    Raises:
        ConfigError: It names no image or object of the index.
        StorageError: The store refused.
    """
    image_id, slot = parsed_like(like)
    if region is None:
        _, offsets, vectors = take_vectors(images, np.array([image_id]))
    else:
        _, offsets, vectors, boxes = take_objects(images, np.array([image_id]))
    vectors = np.asarray(vectors[offsets[0] : offsets[-1]], np.float32)
    if not len(vectors):
        raise ConfigError(f"image {image_id} is not in this snapshot of the index: take the id of a hit")
    if region is not None:
        slot = int(np.argmax(overlaps(unpack_boxes(boxes), region)))
    if slot is not None and slot >= len(vectors):
        found = f"image {image_id} has the slots 0 to {len(vectors) - 1}, got {slot}"
        raise ConfigError(f"{found}: take image id and slot of a hit")
    chosen = vectors if slot is None else vectors[[slot]]
    return Query(chosen / np.linalg.norm(chosen, axis=1, keepdims=True))


def parsed_like(like: str) -> tuple[int, int | None]:
    """Image id and slot that `IMAGE_ID:SLOT` names; no slot where it is `IMAGE_ID`.

    Raises:
        ConfigError: It is neither.
    """
    parts = _LIKE.fullmatch(like.strip())
    if parts is None:
        raise ConfigError(f"{like!r} is no object of the index: expected IMAGE_ID or IMAGE_ID:SLOT of a hit")
    return int(parts[1]), None if parts[2] is None else int(parts[2])


def overlaps(boxes: NDArray[np.floating], region: Box) -> NDArray[np.float64]:
    """Intersection over union of boxes [n, 4] and a region."""
    boxes, other = np.asarray(boxes, np.float64), np.array(region, np.float64)
    sides = np.minimum(boxes[:, 2:], other[2:]) - np.maximum(boxes[:, :2], other[:2])
    common = np.prod(np.clip(sides, 0.0, None), axis=1)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) + np.prod(other[2:] - other[:2])
    return np.asarray(common / (areas - common), np.float64)


def unwanted_limits(sample: ImageVectors, terms: NDArray[np.float32]) -> NDArray[np.float64]:
    """From which score on an image shows a term, by the scores of a sample of the index.

    Cosines of different texts don't compare, so each term has a limit of its own: the lower quartile of the
    sample's image scores plus `LIMIT_SPREADS` times its distance from the lowest twentieth. Both lie among
    images without the thing, be it in none of the index's images or in half of them. On the picture book this
    finds 50, 50, 47 and 41 of 100 images with the thing, and takes 10, 9, 8 and 6 of 100 without it, where it
    is in 4, 15, 30 and 50 % of the images; mean and standard deviation, set to the same at 4 %, find
    55, 47, 35 and 23 of 100.

    Args:
        sample: Vectors of images of the index.
        terms: [t, D], unit length.

    Returns:
        [t]; infinite where the sample is empty.
    """
    _, offsets, vectors = sample
    starts = offsets[:-1][np.diff(offsets) > 0]
    if not len(starts):
        return np.full(len(terms), np.inf)
    scores = np.maximum.reduceat(vectors.astype(np.float64) @ terms.astype(np.float64).T, starts, axis=0)
    lowest, lower = np.quantile(scores, [0.05, 0.25], axis=0)  # [images, t] -> [t]
    return np.asarray(lower + LIMIT_SPREADS * (lower - lowest))


def _check_region(question: Question) -> None:
    x0, y0, x1, y1 = question.region or (0, 0, 1, 1)
    if question.text is not None:
        raise ConfigError("a region is one of a picture: give the picture too, or leave the region out")
    if question.like is not None and parsed_like(question.like)[1] is not None:
        raise ConfigError("a slot is one object, a region another: give IMAGE_ID alone with the region")
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        found = f"a region is x0, y0, x1, y1 as fractions of the picture, got {question.region}"
        raise ConfigError(f"{found}: expected 0 <= x0 < x1 <= 1, and likewise y")


def _objects_of_picture(image: bytes, encoder: Encoder) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    from for_ray.model.preprocess import decode, uncrop_boxes

    config = encoder.bundle.config
    decoded = decode(
        image,
        image_size=config.image_size,
        resize_mode=config.resize_mode,
        interpolation=config.interpolation,
    )
    encoded = encoder.encode(decoded.pixels[None])
    vectors, boxes = (part[encoded.keep].cpu().numpy() for part in (encoded.vectors, encoded.boxes))
    boxes = uncrop_boxes(boxes, decoded.width, decoded.height, resize_mode=config.resize_mode)
    return np.asarray(vectors, np.float32), boxes
