"""Captions of every format, alone and with images; empty, repeated and endless ones; other encodings."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from for_ray.datasets.captions import MAX_CHARACTERS, open_captioned, read_captions
from for_ray.errors import ConfigError, DataError


def test_the_same_captions_from_every_format(tmp_path):
    texts = ["a cat", 'a "red" dog, running', "naïve cow"]
    (tmp_path / "set.txt").write_text("\n".join(texts), encoding="utf-8-sig")
    lines = [f"https://host/{i}.jpg\t{text}" for i, text in enumerate(texts)]
    (tmp_path / "set.tsv").write_text("\r\n".join(lines) + "\r\n", encoding="utf-8", newline="")
    pq.write_table(pa.table({"caption": texts, "id": [1, 2, 3]}), tmp_path / "set.parquet")
    book = [{"file_name": "1.jpg", "captions": texts[:2]}, {"file_name": "2.jpg", "captions": texts[2:]}]
    (tmp_path / "set.jsonl").write_text("\n".join(json.dumps(each) for each in book), encoding="utf-8")
    for ending in ("txt", "tsv", "parquet", "jsonl"):
        assert read_captions(f"{tmp_path}/set.{ending}").texts == tuple(texts)


def test_empty_repeated_and_long_captions_are_counted(tmp_path):
    long = "x" * 10_000
    (tmp_path / "set.txt").write_text(f"a cat\n\n  a   cat \n \n{long}\n")
    found = read_captions(f"{tmp_path}/set.txt")
    assert found.texts == ("a cat", "x" * MAX_CHARACTERS)
    assert (found.num_given, found.num_empty, found.num_repeated, found.num_cut) == (5, 2, 1, 1)
    expected = "2 captions (2 empty and 1 repeated ones left out, 1 cut to 2,000 characters)"
    assert found.describe() == expected


def test_what_ends_no_line_stays_in_the_caption(tmp_path):
    (tmp_path / "set.txt").write_text("one\u2028thing\nanother", encoding="utf-8")
    assert read_captions(f"{tmp_path}/set.txt").texts == ("one thing", "another")


def test_bad_files_are_refused_in_a_line(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="holds no caption: 2 rows, all empty"):
        read_captions(f"{tmp_path}/empty.txt")
    (tmp_path / "old.txt").write_bytes("a\nfianc\xe9".encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8 \(line 2, byte 0xe9\)"):
        read_captions(f"{tmp_path}/old.txt")
    with pytest.raises(DataError, match="must end with"):
        read_captions(f"{tmp_path}/set.doc")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "set.parquet")
    with pytest.raises(DataError, match="has no column caption; it has text"):
        read_captions(f"{tmp_path}/set.parquet")
    (tmp_path / "set.jsonl").write_text('{"file_name": "a"}')
    with pytest.raises(DataError, match="line 1 is not"):
        read_captions(f"{tmp_path}/set.jsonl")


def test_pairs_gather_the_captions_of_an_image(tmp_path):
    rows = "uri,caption\n2.jpg,a dog\n1.jpg,a cat\n2.jpg,a cat\n3.jpg,\n2.jpg,a dog\n"
    (tmp_path / "set.csv").write_text(rows)
    found = open_captioned(f"pairs:{tmp_path}/set.csv")
    assert found.uris.to_pylist() == [f"{tmp_path}/2.jpg", f"{tmp_path}/1.jpg"]
    assert found.captions.texts == ("a dog", "a cat")
    assert [found.of_image.row(row).tolist() for row in range(2)] == [[0, 1], [1]]


def test_the_picture_books_captions_are_pairs(tmp_path):
    (tmp_path / "captions.jsonl").write_text('{"file_name": "1.jpg", "captions": ["a", "b"]}\n')
    found = open_captioned(f"picturebook:{tmp_path}")
    assert found.uris.to_pylist() == [f"{tmp_path}/images/1.jpg"]
    assert found.captions.texts == ("a", "b")


def test_other_specs_and_no_captions_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no captioned images: 'coco:x'; expected pairs:FILE"):
        open_captioned("coco:x")
    (tmp_path / "set.csv").write_text("uri,caption\n1.jpg,\n")
    with pytest.raises(DataError, match="no image with a caption"):
        open_captioned(f"pairs:{tmp_path}/set.csv")
    with pytest.raises(DataError, match="there are no captions at"):
        open_captioned(f"picturebook:{tmp_path}/none")
