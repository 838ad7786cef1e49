from __future__ import annotations

import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from for_ray.errors import DataError, ForRayError
from for_ray.schema import LISTING_SCHEMA
from for_ray.storage import ObjectGone, manifest, manifest_schema, read_manifest


def written(folder: Path, columns: dict[str, object]) -> str:
    path = folder / "manifest.parquet"
    pq.write_table(pa.table(columns), path)
    return str(path)


def rows_of(uri: str) -> list[dict[str, object]]:
    schema = manifest_schema(uri)
    return pa.Table.from_batches(list(read_manifest(uri, schema)), schema).to_pylist()


def test_uri_and_etag_are_enough(tmp_path):
    uri = written(tmp_path, {"etag": ["e1", "e2"], "uri": ["s3://b/a b#%20.jpg", "/x/y.jpg"]})
    assert manifest_schema(uri) == LISTING_SCHEMA
    assert rows_of(uri) == [
        {"uri": "s3://b/a b#%20.jpg", "etag": "e1", "size_bytes": None},
        {"uri": "/x/y.jpg", "etag": "e2", "size_bytes": None},
    ]


def test_quotes_around_etags_go_and_file_uris_become_paths(tmp_path):
    uri = written(tmp_path, {"uri": ["file:///a%20b/c.jpg"], "etag": ['"abc-2"']})
    assert rows_of(uri) == [{"uri": "/a b/c.jpg", "etag": "abc-2", "size_bytes": None}]


def test_other_columns_are_metadata_of_their_own_type(tmp_path):
    day = datetime.date(2026, 11, 22)
    uri = written(
        tmp_path,
        {
            "uri": pa.array(["/a"]).cast(pa.large_string()),
            "etag": pa.array(["e"]).dictionary_encode(),
            "size_bytes": pa.array([7], pa.uint16()),
            "tags": [["x", "y"]],
            "camera": pa.array(["left"]).dictionary_encode(),
            "day": [day],
            "nothing": pa.nulls(1),
            "view": pa.array(["v"], pa.string_view()),
        },
    )
    kinds = {field.name: field.type for field in manifest_schema(uri)}
    assert kinds == {
        **dict(zip(LISTING_SCHEMA.names, LISTING_SCHEMA.types, strict=True)),
        "tags": pa.list_(pa.string()),
        "camera": pa.string(),
        "day": pa.date32(),
        "nothing": pa.string(),
        "view": pa.string(),
    }
    assert rows_of(uri) == [
        {
            "uri": "/a",
            "etag": "e",
            "size_bytes": 7,
            "tags": ["x", "y"],
            "camera": "left",
            "day": day,
            "nothing": None,
            "view": "v",
        }
    ]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"url": ["a"], "tag": ["b"]}, "lacks the column uri and etag: it has url, tag; expected uri, etag"),
        ({"uri": ["/a"], "size": [1]}, "lacks the column etag: it has uri, size;"),
        ({"uri": [1], "etag": ["e"]}, "column uri is int64, expected text"),
        ({"uri": ["/a"], "etag": [b"e"]}, "column etag is binary, expected text"),
        (
            {"uri": ["/a"], "etag": ["e"], "size_bytes": ["9"]},
            "column size_bytes is string, expected integer",
        ),
        (
            {"uri": ["/a"], "etag": ["e"], "width": [9], "_rowid": [1]},
            "uses itself: width, _rowid; rename them",
        ),
        ({"uri": ["/a", None], "etag": ["e", "e"]}, r"uri is null or empty in row 1 \(the first is 0\)"),
        ({"uri": ["/a", ""], "etag": ["e", "e"]}, "uri is null or empty in row 1"),
        ({"uri": ["/a", "/b", "/c"], "etag": ["e", "e", None]}, "etag is null or empty in row 2"),
        ({"uri": ["/a", "b.jpg"], "etag": ["e", "e"]}, r"'b\.jpg' in row 1 .* is no absolute uri"),
        (
            {"uri": ["gs://b/x\n"], "etag": ["e"]},
            r"row 0 .* is no absolute uri; expected s3://bucket/key or /path",
        ),
        ({"uri": ["file://host/x"], "etag": ["e"]}, r"row 0 .* names the host host"),
        (
            {"uri": ["/a"], "etag": ["e"], "size_bytes": pa.array([2**64 - 1], pa.uint64())},
            "size_bytes is no int64",
        ),
    ],
)
def test_wrong_manifests_are_told_in_one_line(tmp_path, columns, reason):
    uri = written(tmp_path, columns)
    with pytest.raises(DataError, match=rf"the manifest \S*manifest\.parquet.*{reason}") as caught:
        rows_of(uri)
    assert "\n" not in str(caught.value)


def test_rows_are_counted_over_all_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "BATCH_ROWS", 10)
    uris = [f"/{n}" for n in range(100)]
    uris[57] = ""
    with pytest.raises(DataError, match="in row 57"):
        rows_of(written(tmp_path, {"uri": uris, "etag": uris}))


def test_a_manifest_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "BATCH_ROWS", 1000)
    num_rows = manifest.BATCH_ROWS * 2 + 1
    numbers = pa.array(range(num_rows)).cast(pa.string())
    uri = written(tmp_path, {"uri": pa.array(["/"] * num_rows), "etag": numbers})
    lengths = [batch.num_rows for batch in read_manifest(uri, manifest_schema(uri))]
    assert sum(lengths) == num_rows
    assert max(lengths) <= manifest.BATCH_ROWS


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "page"])
def test_what_is_no_parquet_is_told(tmp_path, damage):
    uri = written(tmp_path, {"uri": ["/a"] * 1000, "etag": [str(n) for n in range(1000)]})
    sound = Path(uri).read_bytes()
    content = {
        "empty": b"",
        "text": b"uri,etag\n" * 100,
        "truncated": sound[: len(sound) // 2],
        "page": sound[:4] + b"\xff" * 300 + sound[304:],
    }[damage]
    Path(uri).write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.parquet cannot be read as Parquet: ") as caught:
        rows_of(uri)
    assert "\n" not in str(caught.value)


def test_parts_must_have_the_same_columns(tmp_path):
    schema = manifest_schema(written(tmp_path, {"uri": ["/a"], "etag": ["e"], "camera": ["left"]}))
    uri = written(tmp_path, {"uri": ["/a"], "etag": ["e"], "lens": [1]})
    with pytest.raises(DataError, match="differs from the first one in its columns: camera, lens"):
        list(read_manifest(uri, schema))
    uri = written(tmp_path, {"uri": ["/a"], "etag": ["e"], "camera": [1.5]})
    assert next(iter(read_manifest(uri, schema)))["camera"].to_pylist() == ["1.5"]
    schema = schema.set(3, pa.field("camera", pa.int64()))
    with pytest.raises(DataError, match="column camera is no int64"):
        list(read_manifest(uri, schema))


def test_what_is_missing_is_told(tmp_path):
    with pytest.raises(ObjectGone, match=r"x\.parquet is not there; check the path"):
        manifest_schema(str(tmp_path / "x.parquet"))
    with pytest.raises(ForRayError, match="is not a file"):
        manifest_schema(str(tmp_path))
