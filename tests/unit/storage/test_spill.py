from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from for_ray.errors import StorageError
from for_ray.storage import Spill, spill

SCHEMA = pa.schema([("uri", pa.string()), ("number", pa.int64()), ("tags", pa.list_(pa.string()))])


def rows(start: int, stop: int) -> pa.RecordBatch:
    numbers = range(start, stop)
    columns = [[f"s3://b/{n}" for n in numbers], list(numbers), [["x", str(n)] for n in numbers]]
    return pa.record_batch(columns, schema=SCHEMA)


def filled(folder, num_rows: int) -> Spill:
    kept = Spill(folder, SCHEMA)
    for start in range(0, num_rows, 100):
        kept.add(rows(start, min(start + 100, num_rows)))
    kept.finish()
    return kept


def numbers_of(kept: Spill) -> list[list[int]]:
    return [kept.part(number)["number"].to_pylist() for number in range(kept.num_parts)]


def test_few_rows_stay_one_part(tmp_path):
    kept = filled(tmp_path / "rows", 250)
    assert kept.num_parts == 1
    assert kept.num_rows == 250
    assert pa.table(kept.part(0)).combine_chunks().to_batches() == [rows(0, 250)]


def test_no_rows_are_one_empty_part(tmp_path):
    kept = filled(tmp_path / "rows", 0)
    assert (kept.num_rows, kept.num_parts, kept.part(0).num_rows) == (0, 1, 0)
    assert kept.part(0).schema == SCHEMA
    assert not (tmp_path / "rows").exists()


@pytest.mark.parametrize("limit", ["BUFFER_ROWS", "BUFFER_BYTES"])
def test_many_rows_are_parted_by_uri(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(spill, limit, 1000)
    kept = filled(tmp_path / "rows", 5250)
    assert kept.num_parts == spill.NUM_PARTS
    parts = numbers_of(kept)
    assert sorted(n for part in parts for n in part) == list(range(5250))
    sizes = np.array([len(part) for part in parts])
    assert sizes.max() < 4 * 5250 / spill.NUM_PARTS  # the hash spreads
    assert 0 in parts[44]  # the same in every process, unlike `hash`: zlib.crc32(b"s3://b/0") % 256


def test_splitting_gives_the_parts_of_a_large_set(tmp_path, monkeypatch):
    small = filled(tmp_path / "small", 700)
    monkeypatch.setattr(spill, "BUFFER_ROWS", 100)
    large = filled(tmp_path / "large", 700)
    small.split()
    assert [sorted(part) for part in numbers_of(small)] == [sorted(part) for part in numbers_of(large)]
    small.split()
    assert sum(map(len, numbers_of(small))) == 700


def test_splitting_nothing(tmp_path):
    kept = filled(tmp_path / "rows", 0)
    kept.split()
    assert kept.num_parts == spill.NUM_PARTS
    assert kept.part(7).num_rows == 0


def test_a_full_disk_is_told(tiny_disk, monkeypatch):
    monkeypatch.setattr(spill, "BUFFER_ROWS", 1000)
    with pytest.raises(StorageError, match=r"cannot write .*tiny.*: no space is left on the disk"):
        filled(tiny_disk / "rows", 100_000)
