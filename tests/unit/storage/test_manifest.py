from __future__ import annotations

import datetime
import decimal
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from for_ray.errors import DataError, ForRayError
from for_ray.index import table
from for_ray.schema import LISTING_SCHEMA
from for_ray.storage import ObjectGone, manifest, manifest_schema, read_manifest

BERLIN = pa.timestamp("us", "Europe/Berlin")


def written(folder: Path, columns: dict[str, object], name: str = "manifest") -> str:
    path = folder / f"{name}.parquet"
    pq.write_table(pa.table(columns), path)
    return str(path)


def rows_of(uri: str) -> list[dict[str, object]]:
    schema = manifest_schema([uri])
    return pa.Table.from_batches(list(read_manifest(uri, schema)), schema).to_pylist()


def test_uri_and_etag_are_enough(tmp_path):
    uri = written(tmp_path, {"etag": ["e1", "e2"], "uri": ["s3://b/a b#%20.jpg", "/x/y.jpg"]})
    assert manifest_schema([uri]) == LISTING_SCHEMA
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
    kinds = {field.name: field.type for field in manifest_schema([uri])}
    assert kinds == {
        **dict(zip(LISTING_SCHEMA.names, LISTING_SCHEMA.types, strict=True)),
        "tags": pa.list_(pa.string()),
        "camera": pa.string(),
        "day": pa.date32(),
        "nothing": pa.null(),
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
        ({"uri": [None], "etag": ["e"]}, "uri is null or empty in row 0"),
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
    lengths = [batch.num_rows for batch in read_manifest(uri, manifest_schema([uri]))]
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
    first = written(tmp_path, {"uri": ["/a"], "etag": ["e"], "camera": ["left"]}, "0")
    uri = written(tmp_path, {"uri": ["/a"], "etag": ["e"], "size_bytes": [1], "lens": [1]}, "1")
    schema = manifest_schema([first, uri])
    with pytest.raises(DataError, match=r"1\.parquet differs from its other parts in its columns: camera$"):
        list(read_manifest(uri, schema))
    uri = written(tmp_path, {"uri": ["/a"], "etag": ["e"], "camera": [1.5]}, "1")
    with pytest.raises(DataError, match=r"1\.parquet: column camera is double, and string in other parts;"):
        manifest_schema([first, uri])


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        (pa.nulls(1), pa.array([7]), pa.int64()),
        (pa.array([7]), pa.nulls(1), pa.int64()),
        (pa.array([7]), pa.array([1.5]), pa.float64()),
        (pa.array([1.5]), pa.array([7]), pa.float64()),
        (pa.array([[]], pa.list_(pa.null())), pa.array([["x"]]), pa.list_(pa.string())),
        (pa.array(["x"]), pa.array(["y"], pa.large_string()), pa.large_string()),
        (pa.array([1], pa.timestamp("us")), pa.array([1], pa.timestamp("ns")), pa.timestamp("ns")),
        (
            pa.array([[1, 2]], pa.list_(pa.int8(), 2)),
            pa.array([[1] * 3], pa.list_(pa.int8(), 3)),
            pa.list_(pa.int8()),
        ),
        (pa.array([7]), pa.array(["7"]), None),
        (pa.array([True]), pa.array([1]), None),
        (pa.array(["x"]), pa.array([b"x"]), None),
        (pa.array([1], pa.timestamp("us")), pa.array([1], pa.timestamp("us", "UTC")), None),
        (pa.array([1], BERLIN), pa.array([1], pa.timestamp("us", "UTC")), None),
        (pa.array([[1]], pa.list_(BERLIN)), pa.array([[1]], pa.list_(pa.timestamp("us", "UTC"))), None),
        (
            pa.array([{"at": 1}], pa.struct({"at": BERLIN})),
            pa.array([{"at": 1}], pa.struct({"at": pa.timestamp("us", "UTC")})),
            None,
        ),
        (pa.nulls(1, pa.decimal256(76, 0)), pa.nulls(1, pa.decimal256(76, 38)), None),
    ],
)
def test_a_new_column_has_a_type_for_all_parts(tmp_path, first, second, kind):
    values = [first.to_pylist()[0], second.to_pylist()[0]]
    uris = [
        written(tmp_path, {"uri": ["/a"], "etag": ["e"], "m": column}, str(number))
        for number, column in enumerate((first, second))
    ]
    if kind is None:
        with pytest.raises(
            DataError, match=r"1\.parquet: column m is .*, and .* in other parts; give it one type$"
        ) as caught:
            manifest_schema(uris)
        told = str(caught.value).replace("<element:", "<item:")  # Parquet's name
        assert f"column m is {second.type}, and {first.type} in" in told
        return
    schema = manifest_schema(uris)
    assert schema.field("m").type == kind
    rows = [next(iter(read_manifest(uri, schema)))["m"] for uri in uris]
    assert [row.to_pylist()[0] for row in rows] == values


@pytest.mark.parametrize(
    ("known", "column", "expected"),
    [
        (pa.int64(), pa.array([1.0, None]), [1, None]),
        (pa.int64(), pa.array([1.5, None]), "is no int64: Float value 1.5"),
        (pa.int64(), pa.array([float("nan"), 1.0]), "is no int64: Float value nan"),
        (pa.int8(), pa.array([1000]), "is no int8: Integer value 1000 not in range"),
        (pa.int64(), pa.nulls(2), [None, None]),
        (pa.int64(), pa.array(["1"]), "is string, and has been int64 in the index; give it that type, or"),
        (pa.int64(), pa.array([True]), "is bool, and has been int64"),
        (pa.int64(), pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), "and has been int64"),
        (pa.string(), pa.array([1]), "is int64, and has been string"),
        (pa.string(), pa.array(["x"], pa.large_string()), ["x"]),
        (pa.large_string(), pa.array(["x"]), ["x"]),
        (pa.float64(), pa.array([7]), [7.0]),
        (pa.float64(), pa.array([2**53 + 1]), "is no double: Integer value 9007199254740993"),
        (pa.float32(), pa.array([0.1]), "is double, and has been float"),
        (pa.float16(), pa.array([70_000]), "is int64, and has been halffloat"),
        (
            pa.timestamp("us", "UTC"),
            pa.array([2000], pa.timestamp("ns", "UTC")),
            [datetime.datetime(1970, 1, 1, 0, 0, 0, 2, tzinfo=datetime.UTC)],
        ),
        (pa.timestamp("us"), pa.array([1], pa.timestamp("ns")), "would lose data: 1"),
        (pa.list_(pa.int64()), pa.array([[1.0], []], pa.large_list(pa.float64())), [[1], []]),
        (pa.list_(pa.string()), pa.array([[], None], pa.list_(pa.null())), [[], None]),
        (pa.struct([("a", pa.int64())]), pa.array([{"a": 1.0}, {"a": None}]), [{"a": 1}, {"a": None}]),
        (pa.struct([("a", pa.int64())]), pa.array([{"b": 1}]), "is struct<b: int64>, and has been struct<a"),
    ],
)
def test_a_known_column_keeps_its_type(tmp_path, known, column, expected):
    uris = [f"/{number}" for number in range(len(column))]
    uri = written(tmp_path, {"uri": uris, "etag": uris, "m": column})
    table = pa.schema([("uri", pa.string()), ("m", known), ("other", pa.string())])
    if isinstance(expected, str):
        with pytest.raises(DataError, match=f"manifest.parquet: column m .*{expected}"):
            list(read_manifest(uri, manifest_schema([uri], table)))
        return
    schema = manifest_schema([uri], table)
    assert schema == pa.schema([*LISTING_SCHEMA, ("m", known)])
    assert next(iter(read_manifest(uri, schema)))["m"].to_pylist() == expected


_MAP = pa.map_(pa.string(), pa.int64())
_STORABLE = {
    "number": pa.array([7, None], pa.uint64()),
    "half": pa.array([1.5, None], pa.float16()),
    "flag": pa.array([True, None]),
    "price": pa.array([decimal.Decimal("1.50"), None]),
    "bytes": pa.array([b"a", None]),
    "code": pa.array([b"ab", None], pa.binary(2)),
    "day": pa.array([datetime.date(2026, 1, 1), None]),
    "time": pa.array([1, None], pa.timestamp("ns", "Europe/Berlin")),
    "hour": pa.array([1, None], pa.time64("us")),
    "while": pa.array([1, None], pa.duration("s")),
    "tags": pa.array([["a", None], None]),
    "names": pa.array([["a"], []], pa.large_list(pa.field("item", pa.string(), nullable=False))),
    "pair": pa.array([[1, 2], None], pa.list_(pa.int32(), 2)),
    "place": pa.array([{"x": 1, "n": ["a"]}, None]),
    "strict": pa.array([{"x": 1}, {"x": 2}], pa.struct([pa.field("x", pa.int64(), nullable=False)])),
    "both": pa.array([[{"x": 1}], None]),
    "kind": pa.array(["x", "y"]).dictionary_encode(),
    "kinds": pa.ListArray.from_arrays([0, 1, 2], pa.array(["x", "y"]).dictionary_encode()),
    "json": pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}', None])),
    "a b'\"\\ä\n": pa.array([1, None]),
}


def test_what_is_taken_can_be_stored_and_appended_to(tmp_path):
    manifest_uri = written(tmp_path, {"uri": ["/a", "/b"], "etag": ["e", "e"], **_STORABLE})
    schema = manifest_schema([manifest_uri])
    images = table.create_table(str(tmp_path / "images.lance"), LISTING_SCHEMA)
    table.add_missing_columns(images, schema)
    for number in range(3):
        again = manifest_schema([manifest_uri], images.schema)
        assert again == schema
        rows = pa.Table.from_batches(list(read_manifest(manifest_uri, again)), again)
        if number == 1:  # a night without metadata
            rows = rows.set_column(3, "number", pa.nulls(2, pa.uint64()))
            for name in schema.names[4:]:
                column = pa.nulls(2, schema.field(name).type)
                rows = rows.set_column(rows.column_names.index(name), name, column)
        images = table.append(images, table.write_fragments(rows.cast(images.schema), images.uri))
    for _ in range(2):
        found = images.to_table()
        for name, values in _STORABLE.items():
            stored = found[name].to_pylist()
            assert stored == [*values.to_pylist(), None, None, *values.to_pylist()]
        images.optimize.compact_files()


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[("a", 1)]], _MAP),
        pa.array([[[("a", 1)]]], pa.list_(_MAP)),
        pa.array([{"a": [("a", 1)]}], pa.struct([("a", _MAP)])),
        pa.array([{"a.b": 1}]),
        pa.array([{"a`b": 1}]),
        pa.array([{"a": None}]),
        pa.array([["a"]], pa.list_(pa.string(), 1)),
        pa.array([[]], pa.list_(pa.int32(), 0)),
        pa.array([["a"]], pa.list_view(pa.string())),
        pa.array([decimal.Decimal("1.5")], pa.decimal32(5, 2)),
    ],
    ids=lambda column: str(column.type),
)
def test_what_no_table_can_hold_is_refused(tmp_path, column):
    uri = written(tmp_path, {"uri": ["/a"], "etag": ["e"], "m": column})
    message = (
        r"manifest\.parquet: column m is \S.*, which no table can hold: store it as text, or leave it out$"
    )
    with pytest.raises(DataError, match=message):
        manifest_schema([uri])


@pytest.mark.parametrize("name", ["", "a.b", "a`b", "a\0b"])
def test_names_that_no_table_can_hold_are_refused(tmp_path, name):
    uri = written(tmp_path, {"uri": ["/a"], "etag": ["e"], name: [1]})
    with pytest.raises(
        DataError, match=f"a table cannot name: {re.escape(repr(name))}; a name must not"
    ) as caught:
        manifest_schema([uri])
    assert str(caught.value).isprintable()


def test_what_is_missing_is_told(tmp_path):
    with pytest.raises(ObjectGone, match=r"x\.parquet is not there; check the path"):
        manifest_schema([str(tmp_path / "x.parquet")])
    with pytest.raises(ForRayError, match="is not a file"):
        manifest_schema([str(tmp_path)])
