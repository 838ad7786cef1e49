"""A question → ranked images with boxes: one process, one published snapshot of an index.

The index is all that is needed: a snapshot names the encoder's bundle, the segments and the version of the
table of images. An opened index stays with its snapshot, whatever is published later.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from for_ray import storage
from for_ray.errors import ConfigError, DataError, ForRayError
from for_ray.index import snapshots
from for_ray.index.search import ImageVectors, RankedImages, SegmentSet, open_segments, search_images
from for_ray.index.similar import search_similar
from for_ray.index.table import open_table, unpack_vectors
from for_ray.model.bundle import Bundle, open_bundle
from for_ray.schema import Layout, Snapshot, unpack_boxes
from for_ray.sheet import MAX_TILES, Box, Tile, draw_sheet
from for_ray.storage.refusals import lance_refusals

if TYPE_CHECKING:
    from for_ray.model.encoder import Encoder

MAX_HITS = 10_000
"""Images that one search ranks at most: all that is known of the candidates is held in memory."""

_SWEPT = "check credentials and endpoint, or search a newer snapshot"

_COLUMNS = ["uri", "etag", "vectors", "boxes", "_rowid"]


@dataclass(frozen=True)
class Hit:
    """One image of an answer.

    Attributes:
        uri: Where the image lies.
        score: Largest cosine between the query and the image's stored vectors; of a picture, the mean of
            these over its own vectors.
        image_id: Its row id in `images.lance`.
        slot: The stored vector that the score comes from.
        box: What that vector speaks for: x0, y0, x1, y1 as fractions of the upright image's width and height.
        etag: The state of the image that was encoded, for `storage.read_image`; may be empty.
    """

    uri: str
    score: float
    image_id: int
    slot: int
    box: Box
    etag: str

    def to_json(self) -> dict[str, Any]:
        """What `jobs/search.py --json` prints of a hit."""
        box = [round(side, 4) for side in self.box]
        return {"uri": self.uri, "score": self.score, "image_id": self.image_id, "box": box}


def open_index(
    index_uri: str,
    *,
    snapshot_id: int | None = None,
    encoder: str | None = None,
    device: str = "cpu",
    cache_path: Path | None = None,
) -> OpenIndex:
    """Open a published snapshot of an index; segments in a bucket are fetched and kept on this disk.

    Args:
        index_uri: A folder or `s3://bucket/prefix`.
        snapshot_id: Which snapshot; the latest when left out.
        encoder: A bundle, or `open_clip:MODEL@PRETRAINED`, that the index must have been made with.
        device: Where queries are encoded.
        cache_path: Where segments of a bucket are kept; the user's cache folder when left out.

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
    segments = open_segments(
        layout, snapshot.fingerprint, snapshot.segments, nprobe=snapshot.nprobe, cache_path=cache_path
    )
    return OpenIndex(snapshot, bundle=bundle, images=images, segments=segments, device=device)


class OpenIndex:
    """One snapshot of an index, ready to be asked; threads may share it. `open_index` makes it."""

    def __init__(
        self, snapshot: Snapshot, *, bundle: Bundle, images: Any, segments: SegmentSet, device: str
    ) -> None:
        self.snapshot = snapshot
        self.bundle = bundle
        self._images = images
        self._segments = segments
        self._device = device
        self._deleted = np.sort(np.asarray(snapshot.deleted_image_ids, np.int64))
        self._encoder: Encoder | None = None
        self._encoder_lock = threading.Lock()

    @property
    def encoder(self) -> Encoder:
        """The index's own encoder; loaded when the first question comes."""
        with self._encoder_lock:
            if self._encoder is None:
                # torch and open_clip take seconds to import; what is wrong with an index is said before.
                from for_ray.model.encoder import load_encoder

                self._encoder = load_encoder(self.bundle, device=self._device)
            return self._encoder

    def search(self, text: str | None = None, *, image: bytes | None = None, k: int = 50) -> list[Hit]:
        """Rank the images by how near they come to a text, or to what a picture shows.

        Args:
            text: What to look for, in words; an image counts with the nearest of its vectors.
            image: An image file (JPEG, PNG, …) to look for instead, encoded as the index's images are; an
                image counts with the mean, over the picture's vectors, of the nearest of its own.
            k: How many images, 1 to `MAX_HITS`.

        Returns:
            k distinct images, the highest score first, equal scores by image id; fewer only where the
            snapshot has no more.

        Raises:
            ConfigError: Text and image, or neither; an empty text; `k` is out of range.
            DataError: The image can't be decoded, or the index lacks what its snapshot names.
            StorageError: The store refused.
        """
        _check_count(k)
        if (text is None) == (image is None):
            raise ConfigError("a search takes words or a picture: give one of the two")
        if image is None:
            return self.search_vector(self.embed_text(text or ""), k=k)
        taken = _TakenRows(self._images)
        queries = self.encoder.embed_image(image)
        found = search_similar(
            self._segments, queries, k, exact=taken.vectors, exclude_image_ids=self._deleted
        )
        return taken.hits(found)

    def embed_text(self, text: str) -> NDArray[np.float32]:
        """The unit vector [D] of a text, through the encoder's prompt ensemble."""
        if not text.strip():
            raise ConfigError("the words to look for are empty: say what the image should show")
        return np.asarray(self.encoder.embed_text([" ".join(text.split())])[0], np.float32)

    def search_vector(self, query: NDArray[np.float32], *, k: int = 50) -> list[Hit]:
        """As `search` with a text, for a unit vector [D] of the index's encoder."""
        _check_count(k)
        taken = _TakenRows(self._images)
        ranked = search_images(self._segments, query, k, exact=taken.vectors, exclude_image_ids=self._deleted)
        return taken.hits(ranked)

    def write_sheet(
        self, path: Path, hits: Sequence[Hit], *, title: str, example: bytes | None = None
    ) -> None:
        """Write a contact sheet of the first `MAX_TILES` hits, a JPEG file; its folder is made when missing.

        An image that is gone or has changed since it was indexed is a grey tile that says so.
        """
        with ThreadPoolExecutor(16) as readers:
            tiles = list(readers.map(_tile, hits[:MAX_TILES]))
        about = f"{self.bundle.name}, {self.bundle.config.head} · snapshot {self.snapshot.snapshot_id}"
        subtitle = f"the best {len(tiles)} of {self.snapshot.indexed:,} images · {about}"
        storage.write_bytes(str(path), draw_sheet(tiles, title=title, subtitle=subtitle, example=example))


class _TakenRows:
    """The rows that one search takes from the table: their vectors once, for the rest as long as it lasts."""

    def __init__(self, images: Any) -> None:
        self._images = images
        self._tables: list[pa.Table] = []

    def vectors(self, image_ids: NDArray[np.int64]) -> ImageVectors:
        """The stored vectors of these images; those that the table does not hold are left out."""
        ids = ", ".join(map(str, image_ids.tolist()))
        with lance_refusals(self._images.uri, remedy=_SWEPT):
            # With stable row ids, Lance turns this filter into a look-up: 0.05 s for 5,000 of 800,000 rows.
            rows = self._images.to_table(columns=_COLUMNS, filter=f"_rowid in ({ids})")
        self._tables.append(rows.drop_columns(["vectors"]))
        return unpack_vectors(rows["_rowid"], rows["vectors"])

    def hits(self, ranked: RankedImages) -> list[Hit]:
        """What the table says of the ranked images, in their order."""
        if not len(ranked.image_ids):
            return []
        rows = pa.concat_tables(self._tables)
        row_ids = rows["_rowid"].to_numpy().astype(np.int64)
        order = np.argsort(row_ids)
        wanted = order[np.searchsorted(row_ids, ranked.image_ids, sorter=order)]
        found = rows.select(["uri", "etag", "boxes"]).take(pa.array(wanted)).to_pylist()
        answer = zip(found, ranked.image_ids, ranked.slots, ranked.scores, strict=True)
        return [
            Hit(row["uri"], float(score), int(image_id), int(slot), _box(row, int(slot)), row["etag"] or "")
            for row, image_id, slot, score in answer
        ]


def read_example(uri: str) -> bytes:
    """The picture that is asked with.

    Raises:
        ConfigError: There is no such file, or it is not one.
        StorageError: The store refused.
    """
    try:
        return storage.read_image(uri, "")
    except DataError as error:
        raise ConfigError(f"the picture to look for cannot be read: {error}") from error


def check_sheet(path: Path) -> None:
    """Whether a sheet can be written there: to know it before the search.

    Raises:
        ConfigError: The name is not a JPEG's, or a folder's.
        StorageError: The folder is not writable.
    """
    if path.suffix.lower() not in {".jpg", ".jpeg"} or path.is_dir():
        raise ConfigError(f"--sheet {path}: a sheet is a JPEG file; end its name with .jpg")
    storage.check_writable(str(path.parent))


def _tile(hit: Hit) -> Tile:
    name = hit.uri.rsplit("/", 1)[-1]
    try:
        return Tile(name, storage.read_image(hit.uri, hit.etag), hit.box, hit.score)
    except storage.ObjectGone:
        problem = "gone since the index was built"
    except storage.ObjectChanged:
        problem = "changed since the index was built"
    except ForRayError as error:
        problem = f"cannot be read: {error}"
    return Tile(name, score=hit.score, problem=problem)


def _check_count(k: int) -> None:
    if not 1 <= k <= MAX_HITS:
        raise ConfigError(f"a search ranks 1 to {MAX_HITS:,} images, got {k:,}: ask for a number in between")


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
    with lance_refusals(uri, remedy=_SWEPT):
        images = open_table(uri, version=snapshot.images_version)
    if images is None:
        raise DataError(f"{uri}, which snapshot {snapshot.snapshot_id} names, is not there: restore it")
    return images


def _box(row: dict[str, Any], slot: int) -> Box:
    x0, y0, x1, y1 = unpack_boxes(np.asarray(row["boxes"][slot], np.uint8)).tolist()
    return x0, y0, x1, y1
