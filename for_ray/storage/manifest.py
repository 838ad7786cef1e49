"""Manifests: Parquet files that name the images, so that 10⁸ objects need no listing.

Columns: `uri` (an absolute path, `file://…` or `s3://bucket/key`, unescaped), `etag`, optional `size_bytes`;
every other column is the user's metadata and travels into the index when its image is encoded. An etag is the
store's own for `s3://` uris, since reading is bound to it; for files on disk any text that changes with the
file will do. A column keeps the type that it had first: later values come into it where nothing is lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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

NUM_READERS = 8
"""Files whose columns are looked at side by side."""

_TEXT = (pa.types.is_string, pa.types.is_large_string)

_FAMILIES = (
    _TEXT,
    (pa.types.is_binary, pa.types.is_large_binary),
    (pa.types.is_integer, pa.types.is_float32, pa.types.is_float64),
    (pa.types.is_decimal128, pa.types.is_decimal256),
    (pa.types.is_time,),
    (pa.types.is_duration,),
    (pa.types.is_boolean,),
    (pa.types.is_float16,),
    (pa.types.is_date32,),
    (pa.types.is_date64,),
)
"""What Lance stores as it is. To float16, a cast takes whole numbers that are too large for it."""


def manifest_schema(uris: Sequence[str], known: pa.Schema | None = None) -> pa.Schema:
    """`LISTING_SCHEMA`, then the metadata columns of a manifest, nullable, in types that the table can hold.

    A column that is known keeps its type. One that is new gets a type which holds the values of all parts, or
    the type null, where there are none.

    Args:
        uris: The Parquet files that it consists of.
        known: Columns of the table there is.

    Raises:
        DataError: A file is no Parquet, a column is missing or of a wrong type, or has a name that is taken.
        StorageError: The store refused.
    """
    known_kinds = {field.name: field.type for field in known or []}
    kinds: dict[str, pa.DataType] = {}
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for uri, found in zip(uris, pool.map(_columns, uris), strict=True):
            for field in found:
                name = field.name
                kinds[name] = _kind(uri, field, known=known_kinds.get(name), held=kinds.get(name))
    return pa.schema(list(LISTING_SCHEMA) + [pa.field(name, kind) for name, kind in kinds.items()])


def read_manifest(uri: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The rows, streamed; memory is one row group of the file.

    Args:
        uri: One Parquet file.
        schema: What `manifest_schema` made of all of them; each must have the same columns.

    Raises:
        DataError: A uri or etag is null or empty, a uri is relative or of an unknown kind (with the row's
            number), the columns differ from the others', a value does not fit the column's type, or the file
            is damaged.
    """
    num_rows = 0
    with _open(uri) as file:
        differ = set(file.schema_arrow.names).symmetric_difference(schema.names) - {"size_bytes"}
        if differ:
            names = ", ".join(sorted(differ))
            raise DataError(f"the manifest {shown(uri)} differs from its other parts in its columns: {names}")
        for batch in file.iter_batches(BATCH_ROWS):
            yield _checked(uri, batch, schema, num_rows)
            num_rows += batch.num_rows


def _columns(uri: str) -> list[pa.Field]:
    """The metadata columns of one file."""
    with _open(uri) as file:
        found = file.schema_arrow
    _refuse_columns(uri, found)
    return [field for field in found if field.name not in LISTING_SCHEMA.names]


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
    unfit = [name for name in found.names if not _is_name(name)]
    if unfit:
        raise DataError(
            f"the manifest {shown(uri)} has columns that a table cannot name: {', '.join(map(repr, unfit))}; "
            "a name must not be empty or hold a dot, a backtick or a NUL: rename them or leave them out"
        )
    reserved = set(images_schema(1).names) - set(LISTING_SCHEMA.names)
    taken = [name for name in found.names if name in reserved or name.startswith("_row")]
    if taken:
        raise DataError(
            f"the manifest {shown(uri)} has columns whose names the index uses itself: {', '.join(taken)}; "
            "rename them or leave them out"
        )


def _is_name(name: str) -> bool:
    return bool(name) and not set(name) & set(".`\0")


def _is_text(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    return _family(kind) is _TEXT or bool(pa.types.is_null(kind))


def _is_int(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_null(kind))


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type without dictionaries, views and extensions, and nullable all through.

    Lists of nothing but nulls have the type null.
    """
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(each.name, _plain(each.type)) for each in kind])
    if _is_list(kind):
        return _plain_list(kind, _plain(kind.value_type))
    if kind == pa.string_view():
        return pa.string()
    return pa.binary() if kind == pa.binary_view() else kind


def _plain_list(kind: pa.DataType, value: pa.DataType) -> pa.DataType:
    if pa.types.is_null(value):
        return pa.null()
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(value, kind.list_size)
    return pa.large_list(value) if pa.types.is_large_list(kind) else pa.list_(value)


def _kind(uri: str, field: pa.Field, *, known: pa.DataType | None, held: pa.DataType | None) -> pa.DataType:
    """The type for a column of one file, which is `known` from the table or `held` by the files before."""
    kind = _plain(field.type)
    if known is not None:
        if not _fits(kind, known):
            raise _refusal(
                uri, field, f"and has been {known} in the index; give it that type, or another name"
            )
        return known
    if not pa.types.is_null(kind) and not _is_storable(kind):
        raise _refusal(uri, field, "which no table can hold: store it as text, or leave it out")
    if held is None:
        return kind
    refusal = _refusal(uri, field, f"and {held} in other parts; give it one type")
    if not _fits(kind, held) and not _fits(held, kind):
        raise refusal
    both = [pa.schema([("", each)]) for each in (held, kind)]
    try:
        return pa.unify_schemas(both, promote_options="permissive").types[0]
    except pa.ArrowException as error:  # two time zones, or decimals that need more digits than there are
        raise refusal from error


def _refusal(uri: str, field: pa.Field, why: str) -> DataError:
    return DataError(f"the manifest {shown(uri)}: column {shown(field.name)} is {field.type}, {why}")


def _is_storable(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.num_fields > 0 and all(_is_name(each.name) and _is_storable(each.type) for each in kind)
    if pa.types.is_fixed_size_list(kind):  # of text, Lance panics
        return bool(kind.list_size and pa.types.is_primitive(kind.value_type))
    if _is_list(kind):
        return _is_storable(kind.value_type)
    return _family(kind) is not None


def _fits(kind: pa.DataType, held: pa.DataType) -> bool:
    """Whether a column of one type takes values of another; the cast refuses those that do not fit."""
    if kind == held or pa.types.is_null(kind):
        return True
    if _is_list(kind) and _is_list(held):
        return _fits(kind.value_type, held.value_type)
    if pa.types.is_struct(kind) and pa.types.is_struct(held):
        same_names = [each.name for each in kind] == [each.name for each in held]
        return same_names and all(_fits(one.type, other.type) for one, other in zip(kind, held, strict=True))
    if pa.types.is_floating(kind) and pa.types.is_floating(held):  # a cast would round without a word
        return bool(kind.bit_width <= held.bit_width)
    return _family(kind) is not None and _family(kind) == _family(held)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _family(kind: pa.DataType) -> object:
    """The same of types between which a cast loses nothing or refuses; None of what holds no single value."""
    if pa.types.is_timestamp(kind):
        return "timestamp", kind.tz is None
    if pa.types.is_fixed_size_binary(kind):
        return "binary", kind.byte_width
    return next((each for each in _FAMILIES if any(is_one(kind) for is_one in each)), None)


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
    if pa.types.is_null(field.type):
        return pa.nulls(len(column))
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
