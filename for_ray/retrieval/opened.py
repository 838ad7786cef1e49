"""An opened index: one process, one published snapshot; it takes questions and gives answers.

The index is all that is needed: a snapshot names the encoder's bundle, the segments and the version of the
table of images. An opened index stays with its snapshot, whatever is published later.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from for_ray import storage
from for_ray.errors import ConfigError, DataError
from for_ray.index import snapshots
from for_ray.index.probe import Searchable
from for_ray.index.search import ImageVectors, open_segments
from for_ray.index.table import open_table
from for_ray.model.bundle import Bundle, open_bundle
from for_ray.retrieval.asking import Search, TimedSegments
from for_ray.retrieval.filters import columns_of, filtered_ids, is_steady
from for_ray.retrieval.names import Kept, NameVectors
from for_ray.retrieval.paging import check_page, read_token
from for_ray.retrieval.queries import (
    check_count,
    check_question,
    check_vector,
    like_query,
    picture_query,
    text_query,
    unwanted_limits,
)
from for_ray.retrieval.question import Answer, Filters, Hit, Query, Question
from for_ray.retrieval.rows import (
    REMEDY,
    StoredImage,
    StoredObjects,
    find_image,
    find_objects,
    sample_vectors,
)
from for_ray.retrieval.sheets import sheet_of
from for_ray.schema import MAX_SLOTS, Layout, Snapshot
from for_ray.storage.refusals import lance_refusals

if TYPE_CHECKING:
    from for_ray.model.encoder import Encoder


FILTERS_KEPT = 4
"""Filters whose images are known without a look at the table, the last used ones."""

MAX_FILTER_BYTES = 128_000_000
"""That these take together: 8 bytes for each image that passes and, for the bitmap that the segments keep of
them, 32 for each from the first that passes to the last. One that alone takes more is kept until the next:
0.8 GB where all of 20 million images pass. Given ids take 40 bytes each in addition, as Python's numbers."""

IMAGES_KEPT = 10_000
"""Whose place is known without asking the table: a page of hits asks for each thumbnail again and again."""


def open_index(
    index_uri: str,
    *,
    snapshot_id: int | None = None,
    encoder: str | None = None,
    device: str = "cpu",
    cache_path: Path | None = None,
    num_shards: int | None = None,
    shard_cpus: float | None = None,
    beside: OpenIndex | None = None,
) -> OpenIndex:
    """Open a published snapshot of an index; segments in a bucket are fetched and kept on this disk.

    Args:
        index_uri: A folder or `s3://bucket/prefix`.
        snapshot_id: Which snapshot; the latest when left out.
        encoder: A bundle, or `open_clip:MODEL@PRETRAINED`, that the index must have been made with.
        device: Where queries are encoded.
        cache_path: Where segments of a bucket are kept; the user's cache folder when left out.
        num_shards: Ray actors that the segments are shared out among, on the cluster that this process has
            joined; in this process alone when left out.
        shard_cpus: CPUs that each of these actors reserves; one when left out.
        beside: An opened index whose encoder serves this one too, where it is the same.

    Raises:
        ConfigError: The index is of another encoder.
        DataError: Nothing is published there, no such snapshot, or a file of it is missing or damaged.
        StorageError: The store refused.
    """
    layout = Layout(storage.canonical_uri(index_uri))
    snapshot = snapshots.latest(layout) if snapshot_id is None else snapshots.by_id(layout, snapshot_id)
    if encoder is not None:
        _check_encoder(encoder, layout, snapshot)
    bundle = _open_bundle(layout, snapshot)
    images = _open_images(layout, snapshot)
    which = (layout, snapshot.fingerprint, snapshot.segments)
    segments: Searchable
    if num_shards is None:
        segments = open_segments(*which, nprobe=snapshot.nprobe, cache_path=cache_path)
    else:
        from for_ray.stages.shards import ShardSet  # Ray takes a second to import

        segments = ShardSet(
            *which,
            nprobe=snapshot.nprobe,
            num_shards=num_shards,
            num_cpus=shard_cpus,
            cache_path=cache_path,
        )
    texts = None if beside is None else beside.texts_for(bundle)
    return OpenIndex(snapshot, bundle=bundle, images=images, segments=segments, device=device, texts=texts)


def check_index(index_uri: str, *, encoder: str | None = None) -> None:
    """Whether a snapshot is published there, made with this encoder; nothing is opened.

    Raises:
        ConfigError: The index is of another encoder.
        DataError: Nothing is published there.
        StorageError: The store refused.
    """
    layout = Layout(storage.canonical_uri(index_uri))
    snapshot = snapshots.latest(layout)
    if encoder is not None:
        _check_encoder(encoder, layout, snapshot)


class OpenIndex:
    """One snapshot of an index, ready to be asked; threads may share it. `open_index` makes it."""

    def __init__(
        self,
        snapshot: Snapshot,
        *,
        bundle: Bundle,
        images: Any,
        segments: Searchable,
        device: str,
        texts: NameVectors | None = None,
    ) -> None:
        self.snapshot = snapshot
        self.bundle = bundle
        self._images = images
        self._segments = segments
        self._device = device
        self._texts = texts
        self._is_closed = False
        self._sample: ImageVectors | None = None
        self._filtered = _kept_filters()
        self._lock = threading.Lock()
        self._find_image: Callable[[int], StoredImage | None] = functools.lru_cache(IMAGES_KEPT)(
            functools.partial(find_image, images)
        )

    @property
    def encoder(self) -> Encoder:
        """The index's own encoder; loaded when the first question comes."""
        return self._names().encoder

    def texts_for(self, bundle: Bundle) -> NameVectors | None:
        """This index's encoder, and the names it has embedded; None where the bundle's is another."""
        mine = (self.bundle.fingerprint, self.bundle.text_fingerprint)
        return self._texts if mine == (bundle.fingerprint, bundle.text_fingerprint) else None

    def warm(self) -> None:
        """Do what the first question would wait for: load the encoder, read the table and the segments.

        Raises:
            ConfigError: The encoder's weights can't be had.
            DataError: The index lacks what its snapshot names.
            StorageError: The store refused.
        """
        self.ask(Question(text="a photo NOT a drawing", k=1))

    def close(self) -> None:
        """Give back what it holds: segments are unmapped, shards end; nothing can be asked any more."""
        self._is_closed = True
        self._segments.close()
        self._images = self._sample = self._texts = None
        self._filtered = _kept_filters()
        self._find_image = functools.partial(find_image, None)

    def image(self, image_id: int) -> StoredImage | None:
        """Which image an id stands for; None where this snapshot does not hold it."""
        return self._find_image(image_id)

    def objects(self, image_id: int) -> StoredObjects | None:
        """What this snapshot holds of an image; None where it does not hold it."""
        return find_objects(self._images, image_id)

    @property
    def columns(self) -> list[str]:
        """Columns of the table that `Filters.where` may name; those of the manifest among them."""
        return columns_of(self._images)

    def ask(self, question: Question, *, max_looked_at: int | None = None) -> Answer:
        """Answer a question.

        Args:
            question: What to look for.
            max_looked_at: Images that are scored at most where few answer what several names say; no fewer
                than k images need, and 2,000. None looks at all, if it takes them.

        Returns:
            k distinct images, or all that there are; fewer, or none, with the reason.

        Raises:
            QuestionError: The words don't parse; a `ConfigError` with a caret under the spot.
            ConfigError: The question asks for nothing, a number or a filter is wrong, or the page is of
                another question or snapshot.
            PictureError: The picture can't be decoded.
            DataError: The index lacks what its snapshot names.
            StorageError: The store refused.
        """
        check_question(question)
        if self._is_closed:
            raise ValueError("the index was closed: open it again")
        started = time.perf_counter()
        query = self._query(question)
        encoded = time.perf_counter()
        answer = self._answer(question, query, max_looked_at)
        seconds = {"encode": encoded - started, **answer.seconds, "total": time.perf_counter() - started}
        return dataclasses.replace(answer, seconds=seconds)

    def search(self, text: str | None = None, *, image: bytes | None = None, k: int = 50) -> list[Hit]:
        """The hits of a plain question, as `ask` gives them."""
        return list(self.ask(Question(text=text, image=image, k=k)).hits)

    def search_vector(self, query: NDArray[np.float32], *, k: int = 50) -> list[Hit]:
        """As `search`, for a unit vector [D] of the index's encoder.

        Raises:
            ConfigError: It is none, or k is out of range.
            DataError: The index lacks what its snapshot names.
            StorageError: The store refused.
        """
        check_count(k)
        vector = check_vector(query, dim=self.bundle.dim)
        return list(self._answer(Question(k=k), Query(vector[None])).hits)

    def write_sheet(
        self,
        path: Path,
        hits: Sequence[Hit],
        *,
        title: str,
        names: Sequence[str] = (),
        example: bytes | None = None,
    ) -> None:
        """Write a contact sheet of the first `MAX_TILES` hits, a JPEG file; its folder is made when missing.

        An image that is gone or has changed since it was indexed is a grey tile that says so. Names of a
        question, where there are several, have a colour each.
        """
        about = f"{self.bundle.name}, {self.bundle.config.head} · snapshot {self.snapshot.snapshot_id}"
        whole = f"{self.snapshot.indexed:,} images · {about}"
        storage.write_bytes(str(path), sheet_of(hits, title=title, whole=whole, names=names, example=example))

    def _names(self) -> NameVectors:
        with self._lock:
            if self._texts is None:
                # torch and open_clip take seconds to import; what is wrong with an index is said before.
                from for_ray.model.encoder import load_encoder

                self._texts = NameVectors(load_encoder(self.bundle, device=self._device))
            return self._texts

    def _query(self, question: Question) -> Query:
        if question.text is not None:
            return text_query(question.text, self._names())
        if question.image is not None:
            return picture_query(question.image, question.region, self._names())
        return like_query(question.like or "", question.region, self._images)

    def _answer(self, question: Question, query: Query, max_looked_at: int | None = None) -> Answer:
        end = None if question.page is None else read_token(question.page)
        if end is not None:
            check_page(end, snapshot_id=self.snapshot.snapshot_id, key=question.key)
        started = time.perf_counter()
        only = self._filtered_ids(question.filters)
        filtered = time.perf_counter()
        segments = TimedSegments(self._segments)
        asked = Search(
            snapshot=self.snapshot,
            images=self._images,
            segments=segments,
            num_slots=self.bundle.num_slots,
            question=question,
            query=query,
            only=only,
            end=end,
            limits=self._limits,
            max_looked_at=max_looked_at,
        )
        answer = asked.answer()
        searched = time.perf_counter() - filtered
        seconds = {
            "filter": filtered - started,
            "faiss": segments.seconds,
            "rank": searched - segments.seconds,
            "search": searched,
        }
        return dataclasses.replace(answer, seconds=seconds)

    def _filtered_ids(self, filters: Filters) -> NDArray[np.int64] | None:
        """The very same array while it is kept: what the segments make of it is made once."""
        if not (filters and is_steady(filters)):
            return filtered_ids(self._images, filters)
        return self._filtered.get(filters, lambda: filtered_ids(self._images, filters))

    def _limits(self, terms: NDArray[np.float32]) -> NDArray[np.float64]:
        if self._sample is None:
            self._sample = sample_vectors(self._images)  # the same whoever draws it
        return unwanted_limits(self._sample, terms)


def snapshot_of_page(token: str) -> int:
    """The snapshot that a page of an answer goes on in.

    Raises:
        ConfigError: It is no token of a page.
    """
    return read_token(token).snapshot_id


def _kept_filters() -> Kept[Filters, NDArray[np.int64] | None]:
    return Kept(FILTERS_KEPT, most_bytes=MAX_FILTER_BYTES, num_bytes=_filter_bytes)


def _filter_bytes(filters: Filters, ids: NDArray[np.int64] | None) -> int:
    given = 0 if filters.image_ids is None else len(filters.image_ids)
    if ids is None or not len(ids):
        return 40 * given
    return 40 * given + ids.nbytes + MAX_SLOTS // 8 * (int(ids[-1]) - int(ids[0]) + 1)


def _check_encoder(encoder: str, layout: Layout, snapshot: Snapshot) -> None:
    given = open_bundle(encoder, allow_untrained=True).fingerprint
    if given != snapshot.fingerprint:
        found = f"{layout.index_uri} was made with the encoder {snapshot.fingerprint}, {encoder} is {given}"
        raise ConfigError(f"{found}: leave --encoder out to search with the index's own")


def _open_bundle(layout: Layout, snapshot: Snapshot) -> Bundle:
    uri = layout.bundle_uri(snapshot.fingerprint)
    bundle = open_bundle(uri, allow_untrained=True)
    if bundle.fingerprint != snapshot.fingerprint:
        found = f"{uri} holds the encoder {bundle.fingerprint}, expected {snapshot.fingerprint}"
        raise DataError(f"{found}: restore the folder, or build the index anew")
    return bundle


def _open_images(layout: Layout, snapshot: Snapshot) -> Any:
    uri = layout.images_uri(snapshot.fingerprint)
    with lance_refusals(uri, remedy=REMEDY):
        images = open_table(uri, version=snapshot.images_version)
    if images is None:
        raise DataError(f"{uri}, which snapshot {snapshot.snapshot_id} names, is not there: restore it")
    return images
