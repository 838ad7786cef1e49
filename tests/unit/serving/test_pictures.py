"""Images and thumbnails: of what the index holds alone, as what their bytes are, and never as a page."""

import io
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from for_ray import storage
from for_ray.retrieval import StoredImage
from for_ray.serving import pictures
from for_ray.serving.refusals import Refusal
from tests.unit.serving.conftest import SIZE, Served


def encoded(form: str) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(written, form)
    return written.getvalue()


def test_images_are_the_files_that_were_indexed(client: TestClient, served: Served) -> None:
    answer = client.get("/images/0")
    assert answer.content == (served.folder / "0.jpg").read_bytes()
    assert answer.headers["content-type"] == "image/jpeg"
    assert answer.headers["content-disposition"] == "inline"
    assert answer.headers["cache-control"].startswith("private")


def test_a_page_among_the_images_is_no_page(client: TestClient) -> None:
    answer = client.get("/images/6")
    assert answer.text == "<script>alert(1)</script>"
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"] == "attachment"
    assert answer.headers["x-content-type-options"] == "nosniff"
    small = client.get("/thumbnails/6")
    assert (small.status_code, small.json()["code"]) == (410, "gone")
    assert "not an image" in small.json()["error"]


@pytest.mark.parametrize("route", ["/images", "/thumbnails"])
@pytest.mark.parametrize(
    ("image_id", "status", "code", "words"),
    [
        (4, 404, "not_found", "image 4 is not in snapshot 1"),  # it could not be encoded
        (99, 404, "not_found", "image 99 is not in snapshot 1"),
        (7, 410, "gone", "7.jpg is gone since"),
        (8, 410, "gone", "8.jpg was changed since"),
    ],
)
def test_what_is_not_there(
    client: TestClient, route: str, image_id: int, status: int, code: str, words: str
) -> None:
    answer = client.get(f"{route}/{image_id}")
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert words in answer.json()["error"]


def test_thumbnails_have_the_size_that_is_asked_for(client: TestClient) -> None:
    for side in (64, 256, 1024):
        answer = client.get("/thumbnails/0", params={"side": side})
        assert answer.headers["content-type"] == "image/jpeg"
        assert Image.open(io.BytesIO(answer.content)).size == (side, side * SIZE[1] // SIZE[0])
    assert client.get("/thumbnails/0").content == client.get("/thumbnails/0", params={"side": 256}).content
    for side in ("63", "1025", "-1", "1e3", "nan"):
        assert client.get("/thumbnails/0", params={"side": side}).status_code == 400


def test_browsers_keep_thumbnails(client: TestClient) -> None:
    answer = client.get("/thumbnails/1")
    assert answer.headers["cache-control"] == "private, max-age=86400"
    again = client.get("/thumbnails/1", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = client.get("/thumbnails/1?side=64", headers={"If-None-Match": answer.headers["etag"]})
    assert other.status_code == 200
    assert other.headers["etag"] != answer.headers["etag"]


def test_kept_thumbnails_have_a_bound() -> None:
    kept = pictures.Thumbnails(10)
    for name in "abc":
        kept.put(name, b"1234")
    assert (kept.get("a"), kept.get("b"), kept.num_bytes) == (None, b"1234", 8)
    kept.put("d", b"1234")  # "b" was asked for last
    assert (kept.get("b"), kept.get("c")) == (b"1234", None)
    kept.put("b", b"12")
    assert kept.num_bytes == 6
    kept.put("large", b"1" * 11)
    assert (kept.get("large"), kept.get("b"), kept.num_bytes) == (None, None, 0)


def test_a_thumbnail_from_memory_is_of_an_image_that_is_held(served: Served) -> None:
    client = served.client()
    path = served.folder / "2.jpg"
    content = path.read_bytes()
    kept = client.get("/thumbnails/2").content
    path.rename(served.folder / "away")
    try:
        assert client.get("/thumbnails/2").content == kept
        assert client.get("/thumbnails/2?side=100").status_code == 410
    finally:
        (served.folder / "away").rename(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ("JPEG", "image/jpeg"), ("PNG", "image/png"), ("GIF", "image/gif"), ("WEBP", "image/webp"),
        ("BMP", "image/bmp"), ("TIFF", "image/tiff"), ("AVIF", "image/avif"), ("PPM", pictures.OTHER_TYPE),
        ("PDF", pictures.OTHER_TYPE),
    ],
)  # fmt: skip
def test_content_types_come_from_the_bytes(form: str, kind: str) -> None:
    assert pictures.content_type(encoded(form)) == kind


@pytest.mark.parametrize(
    "content", [b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<html>", b"GIF8<script>"]
)
def test_what_is_no_image_has_no_type(content: bytes) -> None:
    assert pictures.content_type(content) == pictures.OTHER_TYPE


def test_the_way_to_the_store(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = client.get("/images/0", params={"redirect": "true"})
    assert (refused.status_code, refused.json()["code"]) == (400, "request")
    assert "lies on disk" in refused.json()["error"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very secret")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    monkeypatch.setattr(storage, "stat", lambda uri: storage.Entry(uri, "as indexed", 9))
    url = pictures.presigned_url(StoredImage(1, "s3://bucket/a folder/<x>.jpg", "", None, None))
    assert "/a%20folder/%3Cx%3E.jpg?" in url
    assert "response-content-type=image%2Fjpeg" in url
    assert "very secret" not in url
    assert "Expires=" in url
    svg = pictures.presigned_url(StoredImage(1, "s3://bucket/x.svg", "", None, None))
    assert "response-content-type=application%2Foctet-stream" in svg
    with pytest.raises(Refusal, match="inside a tar"):
        pictures.presigned_url(StoredImage(1, "s3://bucket/x.tar#a.jpg", "", None, None))
    assert "Expires=" in pictures.presigned_url(StoredImage(1, "s3://bucket/x.jpg", "as indexed", None, None))


def test_no_way_to_what_is_gone_or_was_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    image = StoredImage(1, "s3://bucket/x.jpg", "as indexed", None, None)

    def gone(uri: str) -> storage.Entry:
        raise storage.ObjectGone(uri)

    for stat, words in ((lambda uri: storage.Entry(uri, "new", 9), "was changed since"), (gone, "is gone")):
        monkeypatch.setattr(storage, "stat", stat)
        with pytest.raises(Refusal, match=words) as refused:
            pictures.presigned_url(image)
        assert (refused.value.status, refused.value.code) == (410, "gone")


def test_an_image_with_too_many_pixels_has_no_thumbnail(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(path)
    with pytest.raises(Refusal, match="too many pixels") as refused:
        pictures.make_thumbnail(StoredImage(1, str(path), "", None, None), 256)
    assert refused.value.status == 410
