"""Text and columns from files that people make: UTF-8 text, CSV, TSV and Parquet, on disk or in a bucket.

What may have millions of lines or rows is read as a stream: `stream_lines`, `stream_column`.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from for_ray.errors import DataError
from for_ray.storage import RangedReader, is_s3, read_bytes, shown, stat

MAX_FIELD_CHARACTERS = 1 << 24

BLOCK_BYTES = 8 << 20
"""What a stream of lines reads at once."""

MAX_LINE_BYTES = 1 << 24
"""A longer line is no line of such a file."""

ROWS_AT_ONCE, COLUMN_BYTES = 8192, 1 << 20
"""What a stream of a Parquet column hands on at once, and what it reads at once of a column."""


def read_text(uri: str) -> str:
    """A UTF-8 file, with or without a mark at its beginning.

    Raises:
        DataError: It is not there, or in another encoding; the message names the line.
        StorageError: The store refused.
    """
    return _decoded(uri, read_bytes(uri))


def read_lines(uri: str) -> list[str]:
    """The lines of a UTF-8 file: line feeds end them, and nothing else does.

    Raises:
        DataError: See `read_text`.
        StorageError: The store refused.
    """
    return [line.removesuffix("\r") for line in read_text(uri).removesuffix("\n").split("\n")]


def stream_lines(uri: str) -> Iterator[list[str]]:
    """The lines of a UTF-8 file, some thousands at a time; an empty file has none.

    Memory: a block of the file and its lines.

    Raises:
        DataError: See `read_text`; or a line is far too long.
        StorageError: The store refused, or the file was changed meanwhile.
    """
    entry = stat(uri)
    rest, num_lines = b"", 0
    for start in range(0, entry.size_bytes, BLOCK_BYTES):
        length = min(BLOCK_BYTES, entry.size_bytes - start)
        rest += read_bytes(uri, etag=entry.etag, start=start, length=length)
        whole, feed, rest = rest.rpartition(b"\n")
        if feed:
            lines = _decoded(uri, whole, num_before=num_lines).split("\n")
            num_lines += len(lines)
            yield [line.removesuffix("\r") for line in lines]
        if len(rest) > MAX_LINE_BYTES:
            raise DataError(
                f"{shown(uri)} line {num_lines + 1:,} is longer than {MAX_LINE_BYTES:,} bytes: line feeds "
                "end lines; is it a text file?"
            )
    if rest:
        yield [_decoded(uri, rest, num_before=num_lines).removesuffix("\r")]


def stream_column(uri: str, name: str) -> Iterator[list[str | None]]:
    """A column of texts of a Parquet file, some thousands at a time.

    Memory: these, and the pages that they are on, however large the row groups are.

    Raises:
        DataError: It is no Parquet file, lacks the column, or has no texts there.
        StorageError: The store refused, or the file was changed meanwhile.
    """
    with _readable_parquet(uri):
        file = pq.ParquetFile(RangedReader(stat(uri)), buffer_size=COLUMN_BYTES, pre_buffer=False)
        _require(uri, file.schema_arrow.names, [name])
        _require_texts(uri, file.schema_arrow.field(name))
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=[name], use_threads=False):
            yield batch.column(0).to_pylist()


def read_columns(uri: str, columns: Sequence[str], *, texts: Sequence[str] = ()) -> list[list[str]]:
    """Columns of a CSV, TSV or Parquet file as texts, without spaces around them; "" for null and NaN.

    Args:
        uri: A file whose name ends with `.csv`, `.tsv` or `.parquet`; the first two begin with a header.
        columns: The names that are wanted; there may be others.
        texts: Of these the columns that may not hold numbers in Parquet.

    Returns:
        For each of `columns` its values, in the file's order.

    Raises:
        DataError: It is no such file, lacks a column, has no texts there, a line of another length, or no
            rows.
        StorageError: The store refused.
    """
    if uri.endswith(".parquet"):
        found = _parquet_columns(uri, columns, texts)
    elif uri.endswith((".csv", ".tsv")):
        found = _separated_columns(uri, columns, "\t" if uri.endswith(".tsv") else ",")
    else:
        raise DataError(f"{shown(uri)} must end with .csv, .tsv or .parquet")
    if not found[0]:
        raise DataError(f"{shown(uri)} has no rows")
    return found


def parquet_table(uri: str, columns: Sequence[str]) -> pa.Table:
    """Columns of a Parquet file.

    Raises:
        DataError: It is no Parquet file, or lacks a column.
        StorageError: The store refused.
    """
    with _readable_parquet(uri):
        file = pq.ParquetFile(pa.BufferReader(read_bytes(uri)))
        _require(uri, file.schema_arrow.names, columns)
        return file.read(columns=list(columns))


def beside(uri: str, name: str) -> str:
    """Where a file names another: as it stands if it is absolute, else in the file's own folder."""
    return name if is_s3(name) or name.startswith(("/", "file://")) else f"{uri.rpartition('/')[0]}/{name}"


@contextmanager
def _readable_parquet(uri: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{shown(uri)} is no readable Parquet: {' '.join(str(error).split())[:120]}"
        ) from error


def _decoded(uri: str, content: bytes, *, num_before: int = 0) -> str:
    """Text of a file, or of its lines behind the first `num_before`; what is not UTF-8 is named."""
    if not num_before and content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(
            f"{shown(uri)} is UTF-16, expected UTF-8: convert it, such as by iconv -f UTF-16 -t UTF-8"
        )
    try:
        text = content.decode("utf-8" if num_before else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = num_before + error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{shown(uri)} is not UTF-8 (line {line:,}, byte 0x{error.object[error.start]:02x}): convert it, "
            "such as by iconv -f ISO-8859-1 -t UTF-8"
        ) from error
    if (place := text.find("\0")) >= 0:
        line = num_before + text.count("\n", 0, place) + 1
        raise DataError(
            f"{shown(uri)} is no text (line {line:,} has a byte 0x00): expected UTF-8; UTF-16 without a mark "
            "looks so, convert it, such as by iconv -f UTF-16LE -t UTF-8"
        )
    return text


def _parquet_columns(uri: str, columns: Sequence[str], texts: Sequence[str]) -> list[list[str]]:
    table = parquet_table(uri, columns)
    for name in texts:
        _require_texts(uri, table.schema.field(name))
    return [[_as_text(value) for value in table[name].to_pylist()] for name in columns]


def _as_text(value: object) -> str:
    return "" if value is None or value != value else str(value).strip()  # NaN alone is not itself


def _separated_columns(uri: str, columns: Sequence[str], separator: str) -> list[list[str]]:
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    rows = csv.reader(io.StringIO(read_text(uri), newline=""), delimiter=separator)
    try:
        header = [name.strip() for name in next(rows, [])]
        _require(uri, header, columns)
        places = [header.index(name) for name in columns]
        found: list[list[str]] = [[] for _ in columns]
        for row in filter(None, rows):
            if len(row) != len(header):
                raise DataError(
                    f"{shown(uri)} line {rows.line_num:,} has {len(row)} fields, its header {len(header)}: "
                    "put quotes around fields with separators in them"
                )
            for values, place in zip(found, places, strict=True):
                values.append(row[place].strip())
    except csv.Error as error:
        raise DataError(f"{shown(uri)} line {rows.line_num:,} cannot be read: {error}") from error
    return found


def _require_texts(uri: str, field: pa.Field) -> None:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise DataError(f"{shown(uri)}: the column {field.name} holds {kind}, expected texts (string)")


def _require(uri: str, names: Sequence[str], columns: Sequence[str]) -> None:
    if missing := [name for name in columns if name not in names]:
        raise DataError(
            f"{shown(uri)} has no column {', '.join(missing)}; it has {', '.join(names[:8]) or 'none'}, "
            f"expected {', '.join(columns)}"
        )
