"""Listing and diff over a real S3 server: the same as from disk."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from for_ray.errors import DataError, StorageError
from for_ray.stages.diff import write_gap
from for_ray.stages.listing import Listing, write_listing
from for_ray.storage import (
    ObjectChanged,
    arrow_filesystem,
    delete,
    join_uri,
    ranged,
    read_image,
    s3_client,
    upload,
    write_bytes,
)

pytestmark = pytest.mark.s3

NAMES = ["a.jpg", "deep/er/b.png", "c d#%é.webp", ".hidden.jpg", "deep/.x/y.jpg", "notes.txt", "UP.JPG"]


def fill(root: str, tar_path: Path) -> None:
    for name in NAMES:
        write_bytes(join_uri(root, name), name.encode())
    with tarfile.open(tar_path, "w") as archive:
        for number in range(20):
            header = tarfile.TarInfo(f"x/{number} #é.jpg")
            header.size = number * 100
            archive.addfile(header, io.BytesIO(bytes([number]) * header.size))
    upload(tar_path, join_uri(root, "shards/0.tar"))


def contents_of(listed: Listing, root: str) -> dict[str, tuple[int, bytes]]:
    rows = listed.rows.part(0).to_pylist()
    return {
        row["uri"].removeprefix(f"{root}/"): (row["size_bytes"], read_image(row["uri"], row["etag"]))
        for row in rows
    }


def test_a_bucket_and_a_folder_give_the_same(bucket_uri, tmp_path):
    found = []
    for number, root in enumerate((f"{bucket_uri}/some images", str(tmp_path / "images"))):
        fill(root, tmp_path / "0.tar")
        listed = write_listing(root, tmp_path / str(number))
        assert listed.num_ignored == 3
        assert listed.num_listed == 24
        found.append(contents_of(listed, root))
    assert found[0] == found[1]
    assert found[0]["deep/er/b.png"] == (13, b"deep/er/b.png")
    assert found[0]["shards/0.tar#x/7 #é.jpg"] == (700, bytes([7]) * 700)


def test_bodies_of_tar_members_are_not_read(bucket_uri, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(8):
            header = tarfile.TarInfo(f"{number}.jpg")
            header.size = 2 << 20
            archive.addfile(header, io.BytesIO(os.urandom(header.size)))
    upload(tmp_path / "a.tar", f"{bucket_uri}/a.tar")
    lengths: list[int] = []
    read = ranged.read_bytes
    monkeypatch.setattr(
        ranged, "read_bytes", lambda uri, **range_: lengths.append(range_["length"]) or read(uri, **range_)
    )
    assert write_listing(bucket_uri, tmp_path / "rows").num_listed == 8
    assert sum(lengths) < (16 << 20) / 4
    assert 0 < len(lengths) <= 10


def test_a_tar_that_was_replaced_is_refused(bucket_uri, tmp_path):
    fill(f"{bucket_uri}/x", tmp_path / "0.tar")
    listed = write_listing(f"{bucket_uri}/x/shards", tmp_path / "rows")
    row = listed.rows.part(0).to_pylist()[3]
    write_bytes(f"{bucket_uri}/x/shards/0.tar", b"something else")
    with pytest.raises(ObjectChanged, match=r"0\.tar has changed since it was listed"):
        read_image(row["uri"], row["etag"])


def test_a_manifest_in_the_bucket(bucket_uri, tmp_path):
    etag = write_bytes(f"{bucket_uri}/data/a.jpg", b"content")
    rows = pa.table({"uri": [f"{bucket_uri}/data/a.jpg"], "etag": [f'"{etag}"'], "camera": ["left"]})
    for uri in (f"{bucket_uri}/m.parquet", f"{bucket_uri}/parts/0.parquet"):
        filesystem, path = arrow_filesystem(uri)
        pq.write_table(rows, path, filesystem=filesystem)
    for number, source in enumerate((f"{bucket_uri}/m.parquet", f"{bucket_uri}/parts")):
        listed = write_listing(source, tmp_path / str(number))
        assert listed.metadata == pa.schema([("camera", pa.string())])
        [row] = listed.rows.part(0).to_pylist()
        assert read_image(row["uri"], row["etag"]) == b"content"


def test_a_gap_is_written_where_workers_read(bucket_uri, tmp_path):
    fill(f"{bucket_uri}/images", tmp_path / "0.tar")
    listed = write_listing(f"{bucket_uri}/images", tmp_path / "rows")
    gap = write_gap(listed.rows, iter(()), folder=tmp_path / "diff", gap_uri=f"{bucket_uri}/work/gap")
    [uri] = gap.file_uris
    assert uri.startswith(f"{bucket_uri}/work/gap/")
    filesystem, path = arrow_filesystem(uri)
    assert pq.read_table(path, filesystem=filesystem).num_rows == gap.num_new == 24


def delete_images(bucket_uri: str) -> str:
    write_bytes(f"{bucket_uri}/x/a.jpg", b"")
    delete(f"{bucket_uri}/x/a.jpg")
    return f"{bucket_uri}/x"


def one_object(bucket_uri: str) -> str:
    write_bytes(f"{bucket_uri}/a.jpg", b"")
    return f"{bucket_uri}/a.jpg"


def text_only(bucket_uri: str) -> str:
    write_bytes(f"{bucket_uri}/x/a.txt", b"")
    return f"{bucket_uri}/x"


def text_as_parquet(bucket_uri: str) -> str:
    write_bytes(f"{bucket_uri}/a.parquet", b"uri,etag")
    return f"{bucket_uri}/a.parquet"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda bucket_uri: bucket_uri, r"there are no images in s3://\S+: found nothing; expected files"),
        (delete_images, r"there are no images in s3://\S+/x: found nothing"),
        (one_object, r"a\.jpg is one object, not a prefix; expected"),
        (text_only, r"found 1 of other kinds \(\.txt\)"),
        (text_as_parquet, r"a\.parquet cannot be read as Parquet"),
        (
            lambda bucket_uri: f"{bucket_uri}/none.parquet",
            r"there are no images in s3://\S+/none\.parquet: found nothing",
        ),
        (lambda _: "s3://no-such-bucket/x", "the bucket does not exist; check its name"),
        (lambda _: "s3://no-such-bucket/x.parquet", "the bucket does not exist; check its name"),
    ],
)
def test_sources_without_images_are_told(bucket_uri, tmp_path, make: Callable[[str], str], reason):
    with pytest.raises((DataError, StorageError), match=reason) as caught:
        write_listing(make(bucket_uri), tmp_path / "rows")
    assert "\n" not in str(caught.value)


def test_a_trouble_in_a_tar_is_not_taken_for_its_end(bucket_uri, tmp_path, monkeypatch):
    fill(f"{bucket_uri}/x", tmp_path / "0.tar")
    s3_client()

    def refuse(*_: object, **__: object) -> bytes:
        raise StorageError("cannot read: the store is away")

    monkeypatch.setattr(ranged, "read_bytes", refuse)
    with pytest.raises(StorageError, match="the store is away"):
        write_listing(f"{bucket_uri}/x", tmp_path / "rows")
