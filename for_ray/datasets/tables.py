"""Text and columns from files that people make: UTF-8 text, CSV, TSV and Parquet, on disk or in a bucket."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from for_ray.errors import DataError
from for_ray.storage import is_s3, read_bytes, shown

MAX_FIELD_CHARACTERS = 1 << 24


def read_text(uri: str) -> str:
    """A UTF-8 file, with or without a mark at its beginning.

    Raises:
        DataError: It is not there, or in another encoding; the message names the line.
        StorageError: The store refused.
    """
    content = read_bytes(uri)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{shown(uri)} is not UTF-8 (line {line:,}, byte 0x{content[error.start]:02x}): convert it, such "
            "as by iconv -f ISO-8859-1 -t UTF-8"
        ) from error


def read_lines(uri: str) -> list[str]:
    """The lines of a UTF-8 file: line feeds end them, and nothing else does.

    Raises:
        DataError: See `read_text`.
        StorageError: The store refused.
    """
    return [line.removesuffix("\r") for line in read_text(uri).removesuffix("\n").split("\n")]


def read_columns(uri: str, columns: Sequence[str]) -> list[list[str]]:
    """Columns of a CSV, TSV or Parquet file as texts, without spaces around them; "" for null.

    Args:
        uri: A file whose name ends with `.csv`, `.tsv` or `.parquet`; the first two begin with a header.
        columns: The names that are wanted; there may be others.

    Returns:
        For each of `columns` its values, in the file's order.

    Raises:
        DataError: It is no such file, lacks a column, has a line of another length, or no rows.
        StorageError: The store refused.
    """
    if uri.endswith(".parquet"):
        found = _parquet_columns(uri, columns)
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
    try:
        file = pq.ParquetFile(pa.BufferReader(read_bytes(uri)))
        _require(uri, file.schema_arrow.names, columns)
        return file.read(columns=list(columns))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{shown(uri)} is no readable Parquet: {' '.join(str(error).split())[:120]}"
        ) from error


def beside(uri: str, name: str) -> str:
    """Where a file names another: as it stands if it is absolute, else in the file's own folder."""
    return name if is_s3(name) or name.startswith(("/", "file://")) else f"{uri.rpartition('/')[0]}/{name}"


def _parquet_columns(uri: str, columns: Sequence[str]) -> list[list[str]]:
    table = parquet_table(uri, columns)
    return [
        ["" if value is None else str(value).strip() for value in table[name].to_pylist()] for name in columns
    ]


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


def _require(uri: str, names: Sequence[str], columns: Sequence[str]) -> None:
    if missing := [name for name in columns if name not in names]:
        raise DataError(
            f"{shown(uri)} has no column {', '.join(missing)}; it has {', '.join(names[:8]) or 'none'}, "
            f"expected {', '.join(columns)}"
        )
