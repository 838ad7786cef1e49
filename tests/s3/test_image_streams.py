"""An image of a bucket is streamed as it was indexed, or refused; a client that has it reads nothing."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from starlette.datastructures import Headers
from starlette.responses import StreamingResponse

from for_ray import storage
from for_ray.retrieval import StoredImage
from for_ray.serving.refusals import Refusal
from for_ray.serving.streams import PIECE_BYTES, image_response

pytestmark = pytest.mark.s3

CONTENT = b"\xff\xd8\xff" + np.random.default_rng(0).bytes(PIECE_BYTES + 1000)


def read(answer: StreamingResponse) -> list[bytes]:
    async def pieces() -> list[bytes]:
        return [bytes(piece) async for piece in answer.body_iterator]

    return asyncio.run(pieces())


def test_images_of_a_bucket(bucket_uri: str) -> None:
    uri = f"{bucket_uri}/a folder/<x>.jpg"
    image = StoredImage(1, uri, storage.write_bytes(uri, CONTENT), None, None)
    whole = image_response(image, Headers({}))
    assert isinstance(whole, StreamingResponse)
    assert read(whole) == [CONTENT[:PIECE_BYTES], CONTENT[PIECE_BYTES:]]
    part = image_response(image, Headers({"range": "bytes=-5"}))
    assert isinstance(part, StreamingResponse)
    assert (part.status_code, read(part), part.media_type) == (206, [CONTENT[-5:]], "image/jpeg")
    storage.write_bytes(uri, CONTENT[::-1])
    assert image_response(image, Headers({"if-none-match": whole.headers["etag"]})).status_code == 304
    with pytest.raises(Refusal, match="was changed since"):
        image_response(image, Headers({}))
    storage.delete(uri)
    with pytest.raises(Refusal, match="is gone"):
        image_response(image, Headers({}))
