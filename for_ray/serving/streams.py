"""An image's file as it is sent: piece by piece, whole or a range of it; never all of it in memory."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import partial

import anyio.to_thread
from anyio import CapacityLimiter
from starlette.datastructures import Headers
from starlette.responses import Response, StreamingResponse

from for_ray import storage
from for_ray.retrieval import StoredImage
from for_ray.serving import pictures
from for_ray.serving.refusals import Refusal

PIECE_BYTES = 1 << 20
"""That are read and sent at a time, one request to the store each."""

HEAD_BYTES = 16
"""That tell the type of an image file."""

_RANGE = re.compile(r"bytes=([0-9]{0,17})-([0-9]{0,17})")


@dataclass(frozen=True)
class _File:
    """Where the bytes of an image lie.

    Attributes:
        entry: The object, a tar where the image is a member of one, with the image's own size.
        first: The image's first byte in it.
    """

    entry: storage.Entry
    first: int

    def read(self, start: int, end: int) -> bytes:
        """Some of the image's bytes."""
        uri, etag, _ = self.entry
        return storage.read_bytes(uri, etag=etag, start=self.first + start, length=end - start)

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """These bytes, piece by piece."""
        for begin in range(start, end, PIECE_BYTES):
            yield self.read(begin, min(begin + PIECE_BYTES, end))


def image_response(image: StoredImage, asked: Headers, limiter: CapacityLimiter | None = None) -> Response:
    """The file of an image; `If-None-Match`, `Range` (one) and `If-Range` of the request are heeded.

    Args:
        image: What is sent.
        asked: The request's headers.
        limiter: Of the threads that read what is sent; anyio's own where None.

    Raises:
        Refusal: It is gone, or was changed since it was indexed; or it has no such range.
        StorageError: The store refused.
    """
    headers = {"Cache-Control": "private, no-cache", "Accept-Ranges": "bytes"}
    if image.etag:
        headers["ETag"] = f'"{pictures.image_key(image)}"'
        if is_known(headers["ETag"], asked):
            return Response(status_code=304, headers=headers)
    with pictures.as_indexed(image):
        file = _File(*storage.find_image(image.uri, image.etag))
        size = file.entry.size_bytes
        is_ranged = asked.get("if-range", headers.get("ETag")) == headers.get("ETag")
        wanted = _range(asked.get("range", ""), size) if is_ranged else None
        start, end = wanted or (0, size)
        first = file.read(
            start, min(start + PIECE_BYTES, end)
        )  # what is wrong is said before anything is sent
        has_head = start == 0 and end >= min(HEAD_BYTES, size)
        kind = pictures.content_type(first if has_head else file.read(0, min(HEAD_BYTES, size)))
    headers["Content-Disposition"] = "attachment" if kind == pictures.OTHER_TYPE else "inline"
    headers["Content-Length"] = str(end - start)
    if wanted:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    content = _after(first, file.pieces(start + len(first), end), limiter)
    return StreamingResponse(content, 206 if wanted else 200, headers=headers, media_type=kind)


def is_known(etag: str, asked: Headers) -> bool:
    """Whether the client has this state of a file already."""
    known = asked.get("if-none-match", "")
    return etag in {each.strip().removeprefix("W/") for each in known.split(",")}


async def _after(
    first: bytes, others: Iterator[bytes], limiter: CapacityLimiter | None
) -> AsyncIterator[bytes]:
    yield first
    following = partial(next, others, None)
    while (piece := await anyio.to_thread.run_sync(following, limiter=limiter)) is not None:
        yield piece


def _range(asked: str, size: int) -> tuple[int, int] | None:
    """The first byte and the one after the last; None for the whole file, as for ranges that are not served.

    Raises:
        Refusal: The file ends before.
    """
    parts = _RANGE.fullmatch(asked.strip())
    if parts is None or parts[0] == "bytes=-":
        return None
    first, last = parts[1], parts[2]
    if not first:  # the last so many bytes
        start, end = max(size - int(last), 0), size
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < int(first):
            return None
    if start >= size:
        reason = f"the file has {size:,} bytes: ask for some of these"
        raise Refusal(416, "range", reason, headers={"Content-Range": f"bytes */{size}"})
    return start, end
