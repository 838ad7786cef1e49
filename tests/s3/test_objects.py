"""Objects of a real S3 server: names, pages, ranges, conditions, and what is refused."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from for_ray.errors import DataError, StorageError
from for_ray.storage import (
    ConditionFailed,
    ObjectChanged,
    ObjectGone,
    check_writable,
    delete,
    delete_tree,
    download,
    exists,
    list_objects,
    local_copy,
    read_bytes,
    s3_client,
    stat,
    upload,
    write_bytes,
)
from tests.seaweed import S3Server

pytestmark = pytest.mark.s3

ODD_KEYS = ["a b.jpg", "a#b.jpg", "a%20b.jpg", "é 画像.jpg", "new\nline.jpg", "a?b&c=d+e.jpg", "d/'\"é/x.jpg"]


def listed(uri: str) -> dict[str, str]:
    return {entry.uri: entry.etag for page in list_objects(uri) for entry in page}


def put_many(uri: str, keys: list[str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: write_bytes(f"{uri}/{key}", key.encode()), keys))


def test_odd_keys_are_listed_and_read(bucket_uri):
    root = f"{bucket_uri}/a prefix%20#é"
    put_many(root, ODD_KEYS)
    found = listed(root)
    assert found.keys() == {f"{root}/{key}" for key in ODD_KEYS}
    for uri, etag in found.items():
        assert read_bytes(uri, etag=etag).decode() == uri.removeprefix(f"{root}/")
        assert stat(uri) == (uri, etag, len(uri.removeprefix(f"{root}/").encode()))


def test_listing_goes_on_over_pages_and_ends_at_the_prefix(bucket_uri):
    keys = [f"{number % 7}/{number % 3}/{number}.jpg" for number in range(1203)]
    put_many(f"{bucket_uri}/x", keys)
    put_many(bucket_uri, ["xy/no.jpg", "x.jpg", "x"])
    for uri in (f"{bucket_uri}/x", f"{bucket_uri}/x/"):
        pages = list(list_objects(uri))
        assert max(len(page) for page in pages) <= 1000
        uris = [entry.uri for page in pages for entry in page]
        assert sorted(uris) == sorted(f"{bucket_uri}/x/{key}" for key in keys)
    assert len(listed(bucket_uri)) == 1206
    assert listed(f"{bucket_uri}/nothing") == {}


def test_ranges(bucket_uri):
    uri = f"{bucket_uri}/a"
    etag = write_bytes(uri, b"0123456789")
    assert read_bytes(uri, start=3, length=4, etag=etag) == b"3456"
    assert read_bytes(uri, start=8) == b"89"
    assert read_bytes(uri, length=2) == b"01"
    with pytest.raises(DataError, match="ends too early: 2 bytes are missing"):
        read_bytes(uri, start=8, length=4)
    with pytest.raises(DataError, match="is shorter than its listing says"):
        read_bytes(uri, start=50, length=4)
    with pytest.raises(DataError, match="is too large: 10 bytes, at most 9 are read"):
        read_bytes(uri, max_bytes=9)


def test_reading_is_one_request(bucket_uri):
    uri = f"{bucket_uri}/a"
    etag = write_bytes(uri, b"content")
    requests: list[str] = []
    s3_client().meta.events.register("before-send.s3", lambda request, **_: requests.append(request.method))
    read_bytes(uri, etag=etag)
    assert requests == ["GET"]


def test_replaced_and_deleted_objects_are_told(bucket_uri):
    uri = f"{bucket_uri}/a.jpg"
    old = write_bytes(uri, b"old")
    write_bytes(uri, b"new")
    with pytest.raises(ObjectChanged, match=r"a\.jpg has changed since it was listed"):
        read_bytes(uri, etag=old)
    with pytest.raises(ObjectChanged, match=r"a\.jpg has changed since it was listed"):
        read_bytes(uri, etag=old, start=0, length=1)
    delete(uri)
    delete(uri)
    for read in (lambda: read_bytes(uri, etag=old), lambda: read_bytes(uri), lambda: stat(uri)):
        with pytest.raises(ObjectGone, match=r"a\.jpg is not there"):
            read()


def test_conditional_writes(bucket_uri):
    uri = f"{bucket_uri}/a"
    first = write_bytes(uri, b"1", if_absent=True)
    with pytest.raises(ConditionFailed, match="exists already"):
        write_bytes(uri, b"2", if_absent=True)
    second = write_bytes(uri, b"2", if_etag=first)
    with pytest.raises(ConditionFailed, match="somebody else"):
        write_bytes(uri, b"3", if_etag=first)
    assert read_bytes(uri, etag=second) == b"2"
    delete(uri)
    with pytest.raises(ConditionFailed, match="somebody else"):
        write_bytes(uri, b"3", if_etag=second)


@pytest.mark.parametrize("kind", ["if_absent", "if_etag"])
def test_of_many_writers_one_wins(bucket_uri, kind):
    uri = f"{bucket_uri}/a"
    condition = {"if_absent": True} if kind == "if_absent" else {"if_etag": write_bytes(uri, b"start")}
    barrier = threading.Barrier(6)

    def write(number: int) -> bool:
        barrier.wait()
        try:
            write_bytes(uri, str(number).encode(), **condition)
        except ConditionFailed:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(write, range(6)))
    assert won.count(True) == 1
    assert read_bytes(uri) == str(won.index(True)).encode()


def test_existence(bucket_uri):
    put_many(bucket_uri, ["p/a", "p-q/b"])
    assert [exists(f"{bucket_uri}/{key}") for key in ("p", "p/", "p/a", "p-q")] == [True] * 4
    assert [exists(f"{bucket_uri}/{key}") for key in ("p/a/b", "q", "p-")] == [False] * 3
    assert exists(bucket_uri)


def test_trees_are_deleted_to_the_last_object_and_no_further(bucket_uri):
    put_many(f"{bucket_uri}/x", [f"{number % 5}/{number}" for number in range(1100)])
    put_many(bucket_uri, ["x.jpg", "xy/z"])
    delete_tree(f"{bucket_uri}/x")
    delete_tree(f"{bucket_uri}/x")
    assert set(listed(bucket_uri)) == {f"{bucket_uri}/x.jpg", f"{bucket_uri}/xy/z"}
    with pytest.raises(StorageError, match="it is a whole bucket; name a prefix in it"):
        delete_tree(f"{bucket_uri}/")
    assert len(listed(bucket_uri)) == 2


def test_large_files_go_there_and_back(bucket_uri, tmp_path):
    content = os.urandom(1 << 20) * 18  # above the 8 MiB of one part
    (tmp_path / "a").write_bytes(content)
    upload(tmp_path / "a", f"{bucket_uri}/a")
    download(f"{bucket_uri}/a", tmp_path / "back" / "a")
    assert (tmp_path / "back" / "a").read_bytes() == content
    with pytest.raises(ObjectGone, match="/b is not there"):
        download(f"{bucket_uri}/b", tmp_path / "back" / "b")
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["a"]


def test_copies_are_kept_and_checked(bucket_uri, tmp_path):
    uri, sha256 = f"{bucket_uri}/a.faiss", hashlib.sha256(b"index").hexdigest()
    write_bytes(uri, b"index")
    path = local_copy(uri, sha256=sha256, cache_path=tmp_path)
    assert path.read_bytes() == b"index"
    assert path.suffix == ".faiss"
    delete(uri)
    assert local_copy(uri, sha256=sha256, cache_path=tmp_path) == path
    write_bytes(uri, b"index")
    path.write_bytes(b"damaged in the cache")
    assert local_copy(uri, sha256=sha256, cache_path=tmp_path).read_bytes() == b"index"


def test_a_copy_of_another_checksum_is_not_kept(bucket_uri, tmp_path):
    write_bytes(f"{bucket_uri}/a", b"damaged in the store")
    with pytest.raises(DataError, match="/a is damaged or was replaced"):
        local_copy(f"{bucket_uri}/a", sha256="0" * 64, cache_path=tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_copies_lie_in_the_users_cache(bucket_uri, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_bytes(f"{bucket_uri}/a", b"index")
    path = local_copy(f"{bucket_uri}/a", sha256=hashlib.sha256(b"index").hexdigest())
    assert path.is_relative_to(tmp_path / "for_ray")


def test_checking_leaves_nothing(bucket_uri):
    check_writable(f"{bucket_uri}/index")
    assert listed(bucket_uri) == {}


ACTIONS: dict[str, Callable[[str, Path], object]] = {
    "list": lambda uri, _: list(list_objects(uri)),
    "stat": lambda uri, _: stat(uri),
    "read": lambda uri, _: read_bytes(uri),
    "write": lambda uri, _: write_bytes(uri, b""),
    "check": lambda uri, _: check_writable(uri),
    "exists": lambda uri, _: exists(uri),
    "delete_tree": lambda uri, _: delete_tree(uri),
    "upload": lambda uri, path: upload(path, uri),
    "download": lambda uri, path: download(uri, path.with_name("back")),
}

WRONG_SETTINGS: dict[str, tuple[dict[str, str | None], str]] = {
    "secret": (
        {"AWS_SECRET_ACCESS_KEY": "wrong"},
        "the secret key does not belong to the access key; check AWS_SECRET_ACCESS_KEY or AWS_PROFILE",
    ),
    "key": (
        {"AWS_ACCESS_KEY_ID": "wrong"},
        "the store does not know the access key; check AWS_ACCESS_KEY_ID",
    ),
    "nothing": (
        {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
        "there are no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    ),
    "half": ({"AWS_SECRET_ACCESS_KEY": None}, "the AWS credentials are incomplete"),
    "profile": ({"AWS_PROFILE": "nobody"}, r"profile \(nobody\) could not be found; check AWS_PROFILE"),
    "closed": (
        {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
        r"the store cannot be reached at http://127\.0\.0\.1:9 \(AWS_ENDPOINT_URL.*; check the address",
    ),
    "unknown": (
        {"AWS_ENDPOINT_URL": "http://no-such-host.invalid"},
        r"the store cannot be reached at http://no-such-host\.invalid",
    ),
    "bare": (
        {"AWS_ENDPOINT_URL": "127.0.0.1:9"},
        "the endpoint is not valid .*it starts with http:// or https://",
    ),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_a_missing_bucket_is_told(action, tmp_path):
    (tmp_path / "file").touch()
    message = r"cannot \w+ s3://no-such-bucket/x\S*: the bucket does not exist; check its name, and AWS_"
    with pytest.raises(StorageError, match=message) as caught:
        ACTIONS[action]("s3://no-such-bucket/x", tmp_path / "file")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("action", ["list", "stat", "read"])
@pytest.mark.parametrize("wrong", WRONG_SETTINGS)
def test_wrong_settings_are_told(bucket_uri, monkeypatch, tmp_path, wrong, action):
    write_bytes(f"{bucket_uri}/x", b"")
    settings, reason = WRONG_SETTINGS[wrong]
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    for name, value in settings.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match=reason) as caught:
        ACTIONS[action](f"{bucket_uri}/x", tmp_path / "file")
    assert "\n" not in str(caught.value)


def test_https_to_an_http_server_is_told(s3_server: S3Server, bucket_uri, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint.replace("http:", "https:"))
    with pytest.raises(
        StorageError, match=r"no secure connection to https://127.*check AWS_ENDPOINT_URL \(http or"
    ):
        list(list_objects(bucket_uri))
