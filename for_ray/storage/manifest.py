"""Manifests: Parquet files that name the images, so that 10⁸ objects need no listing.

Columns: `uri` (an absolute path, `file://…` or `s3://bucket/key`, unescaped), `etag`, optional `size_bytes`;
every other column is the user's metadata and travels into the index. An etag is the store's own for `s3://`
uris, since reading is bound to it; for files on disk any text that changes with the file will do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from for_ray.errors import ConfigError, DataError, StorageError
from for_ray.schema import LISTING_SCHEMA, images_schema
from for_ray.storage.connections import arrow_filesystem
from for_ray.storage.objects import stat
from for_ray.storage.refusals import disk_refusal
from for_ray.storage.uris import canonical_uri, shown

BATCH_ROWS = 1 << 16


def manifest_schema(uri: str) -> pa.Schema:
    """`LISTING_SCHEMA`, then the metadata columns of a manifest, nullable, in types that the table can hold.

    Raises:
        DataError: It is no Parquet file, a column is missing or of a wrong type, or has a name that is taken.
        StorageError: The store refused.
    """
    with _open(uri) as file:
        found = file.schema_arrow
    _refuse_columns(uri, found)
    others = [field for field in found if field.name not in LISTING_SCHEMA.names]
    return pa.schema(list(LISTING_SCHEMA) + [pa.field(field.name, _plain(field.type)) for field in others])


def read_manifest(uri: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The rows, streamed; memory is one row group of the file.

    Args:
        uri: One Parquet file.
        schema: What `manifest_schema` made of the first file; the others must have the same columns.

    Raises:
        DataError: A uri or etag is null or empty, a uri is relative or of an unknown kind (with the row's
            number), the columns differ from the first file's, or the file is damaged.
    """
    own = manifest_schema(uri)
    if set(own.names) != set(schema.names):
        differ = ", ".join(sorted(set(own.names) ^ set(schema.names)))
        raise DataError(f"the manifest {shown(uri)} differs from the first one in its columns: {differ}")
    num_rows = 0
    with _open(uri) as file:
        for batch in file.iter_batches(BATCH_ROWS):
            yield _checked(uri, batch, schema, num_rows)
            num_rows += batch.num_rows


def _refuse_columns(uri: str, found: pa.Schema) -> None:
    missing = [name for name in ("uri", "etag") if name not in found.names]
    if missing:
        raise DataError(
            f"the manifest {shown(uri)} lacks the column {' and '.join(missing)}: "
            f"it has {', '.join(found.names)}; expected uri, etag and optionally size_bytes"
        )
    if len(set(found.names)) < len(found.names):
        raise DataError(f"the manifest {shown(uri)} has two columns of one name: {', '.join(found.names)}")
    for name, is_right, wanted in (
        ("uri", _is_text, "text"),
        ("etag", _is_text, "text"),
        ("size_bytes", _is_int, "integer"),
    ):
        if name in found.names and not is_right(found.field(name).type):
            raise DataError(
                f"the manifest {shown(uri)}: column {name} is {found.field(name).type}, expected {wanted}"
            )
    unfit = [name for name in found.names if not name or "." in name]
    if unfit:
        raise DataError(
            f"the manifest {shown(uri)} has columns that a table cannot name: {', '.join(map(repr, unfit))}; "
            "a name must not be empty or hold a dot: rename them or leave them out"
        )
    reserved = set(images_schema(1).names) - set(LISTING_SCHEMA.names)
    taken = [name for name in found.names if name in reserved or name.startswith("_row")]
    if taken:
        raise DataError(
            f"the manifest {shown(uri)} has columns whose names the index uses itself: {', '.join(taken)}; "
            "rename them or leave them out"
        )


def _is_text(kind: pa.DataType) -> bool:
    return _plain(kind) in (pa.string(), pa.large_string())


def _is_int(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_null(kind))


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type without dictionaries and views; a column of nothing but nulls becomes text."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if kind == pa.string_view() or pa.types.is_null(kind):
        return pa.string()
    return pa.binary() if kind == pa.binary_view() else kind


def _checked(uri: str, batch: pa.RecordBatch, schema: pa.Schema, first_row: int) -> pa.RecordBatch:
    columns = []
    for field in schema:
        if field.name not in batch.schema.names:  # size_bytes
            columns.append(pa.nulls(batch.num_rows, field.type))
            continue
        columns.append(_cast(uri, batch[field.name], field))
    uris, etags = columns[:2]
    for name, column in (("uri", uris), ("etag", etags)):
        _refuse_rows(
            uri, pc.or_kleene(pc.is_null(column), pc.equal(column, "")), first_row, f"{name} is null or empty"
        )
    is_absolute = pc.or_(pc.starts_with(uris, "s3://"), pc.starts_with(uris, "/"))
    if not pc.all(is_absolute).as_py():
        uris = pa.array(
            [_absolute(uri, value, first_row + row) for row, value in enumerate(uris.to_pylist())]
        )
    # S3 puts etags into quotes, its inventories do not.
    columns[:2] = uris, pc.utf8_trim(etags, '"')
    return pa.record_batch(columns, schema=schema)


def _cast(uri: str, column: Any, field: pa.Field) -> Any:
    try:
        return column.cast(field.type)
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"the manifest {shown(uri)}: column {field.name} is no {field.type}: {reason}"
        ) from error


def _refuse_rows(uri: str, is_bad: Any, first_row: int, reason: str) -> None:
    bad = pc.index(is_bad, True).as_py()
    if bad >= 0:
        raise DataError(f"the manifest {shown(uri)}: {reason} in row {first_row + bad} (the first is 0)")


def _absolute(manifest: str, uri: str, row: int) -> str:
    if not uri.startswith(("/", "s3://", "file://")):
        raise DataError(
            f"the manifest {shown(manifest)}: {shown(uri)!r} in row {row} (the first is 0) is no absolute "
            "uri; expected s3://bucket/key or /path"
        )
    try:
        return canonical_uri(uri) if uri.startswith("file://") else uri
    except ConfigError as error:
        raise DataError(f"the manifest {shown(manifest)}: row {row} (the first is 0): {error}") from error


@contextmanager
def _open(uri: str) -> Iterator[pq.ParquetFile]:
    """The Parquet file; what pyarrow raises while it is read becomes one line."""
    stat(uri)  # boto3 knows better than pyarrow why a store refuses
    filesystem, path = arrow_filesystem(uri)
    try:
        with filesystem.open_input_file(path) as source, pq.ParquetFile(source) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, OSError) and error.errno:
            raise disk_refusal(error, "read", uri) from error
        if "AWS Error" in reason:
            raise StorageError(f"cannot read {shown(uri)}: {reason}") from error
        raise DataError(f"the manifest {shown(uri)} cannot be read as Parquet: {reason}") from error
