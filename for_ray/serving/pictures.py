"""Images and thumbnails of what the index holds, read from where it says that they lie."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from for_ray import storage
from for_ray.errors import DataError
from for_ray.model.image_files import open_image
from for_ray.retrieval import OpenIndex, PictureError, StoredImage
from for_ray.serving.refusals import Refusal
from for_ray.sheet import MAX_PIXELS, thumbnail

REDIRECT_SECONDS = 300
"""For which a presigned URL is good."""

MAX_UPLOAD_PIXELS = 25_000_000
"""Of a picture to look for: 75 MB of RGB. Encoders see much less, and the page sends smaller ones."""

OTHER_TYPE = "application/octet-stream"

_SIGNATURES = {
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"GIF87a": "image/gif",
    b"GIF89a": "image/gif",
    b"BM": "image/bmp",
    b"II*\0": "image/tiff",
    b"MM\0*": "image/tiff",
}

_SUFFIXES = {
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "png": "image/png",
    "webp": "image/webp",
    "gif": "image/gif",
    "bmp": "image/bmp",
    "avif": "image/avif",
    "tif": "image/tiff",
    "tiff": "image/tiff",
}


def content_type(content: bytes) -> str:
    """The type of an image file by its bytes; `OTHER_TYPE` for all that browsers may take for a page."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    if content[4:8] == b"ftyp" and content[8:12] in {b"avif", b"avis"}:
        return "image/avif"
    return next((kind for start, kind in _SIGNATURES.items() if content.startswith(start)), OTHER_TYPE)


def check_upload(content: bytes) -> None:
    """Whether a picture to look for is an image that is not too large, by its header: nothing is decoded.

    Raises:
        PictureError: It is not.
    """
    try:
        open_image(content, max_pixels=MAX_UPLOAD_PIXELS)
    except DataError as error:
        found = f"the picture to look for can't be decoded: {error}"
        raise PictureError(f"{found}; give another one, or make it smaller") from error


def held_image(index: OpenIndex, image_id: int) -> StoredImage:
    """The image with this id.

    Raises:
        Refusal: The index does not hold it.
    """
    image = index.image(image_id)
    if image is None:
        raise not_held(index, image_id)
    return image


def not_held(index: OpenIndex, image_id: int) -> Refusal:
    """What is said of an image that is not there."""
    snapshot_id = index.snapshot.snapshot_id
    found = f"image {image_id} is not in snapshot {snapshot_id} of the index"
    return Refusal(404, "not_found", f"{found}: take the id of a hit")


def read_image(image: StoredImage) -> bytes:
    """The image file as it was indexed.

    Raises:
        Refusal: It is gone, or was changed since.
        StorageError: The store refused.
    """
    with as_indexed(image):
        return storage.read_image(image.uri, image.etag)


@contextmanager
def as_indexed(image: StoredImage) -> Iterator[None]:
    """What the store says of an image that is gone, or was changed since, as a refusal."""
    uri = storage.shown(image.uri)
    found = "since the index was built: run jobs/index.py again"
    try:
        yield
    except storage.ObjectGone as error:
        raise Refusal(410, "gone", f"{uri} is gone {found}") from error
    except storage.ObjectChanged as error:
        raise Refusal(410, "gone", f"{uri} was changed {found}") from error
    except DataError as error:
        raise Refusal(410, "gone", f"the image cannot be read any more: {error}") from error


def presigned_url(image: StoredImage) -> str:
    """Where a client fetches the image from the store itself, for `REDIRECT_SECONDS`.

    Raises:
        Refusal: It lies on disk or inside a tar, is gone, or was changed since it was indexed.
        StorageError: The store refused, the profile does not exist, or the endpoint is not valid.
    """
    uri = storage.shown(image.uri)
    if not storage.is_s3(image.uri):
        raise Refusal(400, "request", f"{uri} lies on disk: ask without redirect")
    if ".tar#" in image.uri.lower():
        raise Refusal(400, "request", f"{uri} lies inside a tar: ask without redirect")
    with as_indexed(image):
        entry = storage.stat(image.uri)
        if image.etag and image.etag != entry.etag:
            raise storage.ObjectChanged(uri)
    bucket, key = storage.split_s3(image.uri)
    kind = _SUFFIXES.get(key.rsplit(".", 1)[-1].lower(), OTHER_TYPE)
    request: dict[str, Any] = {"Bucket": bucket, "Key": key, "ResponseContentType": kind}
    client = storage.s3_client()
    return str(client.generate_presigned_url("get_object", Params=request, ExpiresIn=REDIRECT_SECONDS))


def image_key(image: StoredImage, side: int | None = None) -> str:
    """The same for the same picture, or a thumbnail of it: what browsers and the memory keep them by."""
    return hashlib.sha256(repr((image.uri, image.etag, side)).encode("utf-8", "replace")).hexdigest()[:32]


def make_thumbnail(image: StoredImage, side: int) -> bytes:
    """A JPEG file whose longest side is `side` pixels.

    Raises:
        Refusal: The image is gone, changed, or can't be decoded any more.
        StorageError: The store refused.
    """
    content = read_image(image)
    try:
        open_image(content, max_pixels=MAX_PIXELS)  # of the formats that the index reads, and no others
        return thumbnail(content, side)
    except DataError as error:
        raise Refusal(410, "gone", f"the image cannot be decoded: {error}") from error


class Thumbnails:
    """Thumbnails that were made, the last used ones; threads may share it.

    Args:
        max_bytes: Of all that are kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Of all that are kept now."""
        return self._num_bytes

    def get(self, key: str) -> bytes | None:
        """A kept thumbnail, or None."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: str, content: bytes) -> None:
        """Keep a thumbnail in the place of those that were not asked for the longest."""
        with self._lock:
            self._num_bytes += len(content) - len(self._kept.pop(key, b""))
            self._kept[key] = content
            while self._num_bytes > self._max_bytes:
                self._num_bytes -= len(self._kept.popitem(last=False)[1])
