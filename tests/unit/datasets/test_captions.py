"""Captions of every format, alone and with images; empty, repeated and endless ones; other encodings."""

from __future__ import annotations

import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from for_ray.datasets import tables
from for_ray.datasets.captions import MAX_CHARACTERS, CaptionStream, open_captioned
from for_ray.errors import ConfigError, DataError


def read_captions(path: object) -> list[str]:
    return [text for texts in CaptionStream(str(path)) for text in texts]


def test_the_same_captions_from_every_format(tmp_path):
    texts = ["a cat", 'a "red" dog, running', "naïve cow"]
    (tmp_path / "set.txt").write_text("\n".join(texts), encoding="utf-8-sig")
    lines = [f"https://host/{i}.jpg\t{text}" for i, text in enumerate(texts)]
    (tmp_path / "set.tsv").write_text("\r\n".join(lines) + "\r\n", encoding="utf-8", newline="")
    pq.write_table(pa.table({"caption": texts, "id": [1, 2, 3]}), tmp_path / "set.parquet")
    book = [{"file_name": "1.jpg", "captions": texts[:2]}, {"file_name": "2.jpg", "captions": texts[2:]}]
    (tmp_path / "set.jsonl").write_text("\n".join(json.dumps(each) for each in book), encoding="utf-8")
    for ending in ("txt", "tsv", "parquet", "jsonl"):
        assert read_captions(f"{tmp_path}/set.{ending}") == texts


def test_empty_repeated_and_long_captions_are_counted(tmp_path):
    long = "x" * 10_000
    (tmp_path / "set.txt").write_text(f"a cat\n\n  a   cat \n \n{long}\n")
    stream = CaptionStream(f"{tmp_path}/set.txt")
    assert list(stream) == [["a cat", "x" * MAX_CHARACTERS]]
    counts = stream.counts
    assert (counts.num_given, counts.num_empty, counts.num_repeated, counts.num_cut) == (5, 2, 1, 1)
    expected = "2 captions (2 empty and 1 repeated ones left out, 1 cut to 2,000 characters)"
    assert counts.describe() == expected


def test_what_ends_no_line_stays_in_the_caption(tmp_path):
    (tmp_path / "set.txt").write_text("one\u2028thing\nanother", encoding="utf-8")
    assert read_captions(f"{tmp_path}/set.txt") == ["one thing", "another"]


def test_blocks_of_any_size_give_the_same_captions(tmp_path, monkeypatch):
    texts = [f"naïve cow {number % 9}" if number % 5 else "" for number in range(60)]
    expected = list(dict.fromkeys(filter(None, texts)))
    (tmp_path / "set.txt").write_text("\n".join(texts), encoding="utf-8-sig")
    pq.write_table(pa.table({"caption": texts}), tmp_path / "set.parquet", row_group_size=7)
    book = [{"file_name": "1.jpg", "captions": [text]} for text in texts]
    (tmp_path / "set.jsonl").write_text("\n".join(json.dumps(each) for each in book), encoding="utf-8")
    monkeypatch.setattr(tables, "ROWS_AT_ONCE", 4)
    for num_bytes in (1, 7, 40):  # characters and lines are cut by the blocks
        monkeypatch.setattr(tables, "BLOCK_BYTES", num_bytes)
        monkeypatch.setattr(tables, "COLUMN_BYTES", num_bytes)
        for ending in ("txt", "parquet", "jsonl"):
            stream = CaptionStream(f"{tmp_path}/set.{ending}")
            assert [text for some in stream for text in some] == expected
            assert (stream.counts.num_given, stream.counts.num_empty) == (60, 12)
            assert stream.counts.num_repeated == 48 - len(expected)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["tsv", "parquet"])
def test_many_captions_are_never_in_memory_together(tmp_path, monkeypatch, ending):
    """200,000 captions are 20 MB; held are a block, and 8 bytes a caption, twice while they are sorted."""
    monkeypatch.setattr(tables, "BLOCK_BYTES", 1 << 18)
    texts = [f"{number * 2_654_435_761 % 2**32:032b} in a field of {number}" for number in range(200_000)]
    if ending == "tsv":
        (tmp_path / "set.tsv").write_text("".join(f"a.jpg\t{text}\n" for text in texts))
    else:
        pq.write_table(pa.table({"caption": texts}), tmp_path / "set.parquet", row_group_size=len(texts))
    del texts
    tracemalloc.start()
    try:
        stream = CaptionStream(f"{tmp_path}/set.{ending}")
        num_read = sum(map(len, stream))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert num_read == stream.counts.num_distinct == 200_000
    assert peak < 10e6


def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BLOCK_BYTES", 1000)
    (tmp_path / "set.txt").write_bytes(b"".join(b"caption %d\n" % number for number in range(1000)) + b"\xff")
    first = next(iter(CaptionStream(f"{tmp_path}/set.txt")))
    assert (first[0], len(first)) == ("caption 0", 91)
    with pytest.raises(DataError, match=r"not UTF-8 \(line 1,001, byte 0xff\)"):
        read_captions(tmp_path / "set.txt")


def test_bad_files_are_refused_in_a_line(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="holds no caption: 2 rows, all empty"):
        read_captions(f"{tmp_path}/empty.txt")
    (tmp_path / "old.txt").write_bytes("a\nfianc\xe9".encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8 \(line 2, byte 0xe9\)"):
        read_captions(f"{tmp_path}/old.txt")
    for encoding, message in (
        ("utf-16", "is UTF-16, expected UTF-8"),
        ("utf-16-le", "line 1 has a byte 0x00"),
    ):
        (tmp_path / "wide.txt").write_text("a cat\na dog", encoding=encoding)
        with pytest.raises(DataError, match=message):
            read_captions(f"{tmp_path}/wide.txt")
    (tmp_path / "none.txt").write_text("")
    with pytest.raises(DataError, match="holds no caption: 0 rows"):
        read_captions(f"{tmp_path}/none.txt")
    with pytest.raises(DataError, match="is not there; check the path"):
        read_captions(f"{tmp_path}/nowhere.txt")
    with pytest.raises(DataError, match="must end with"):
        read_captions(f"{tmp_path}/set.doc")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "set.parquet")
    with pytest.raises(DataError, match="has no column caption; it has text"):
        read_captions(f"{tmp_path}/set.parquet")
    pq.write_table(pa.table({"caption": [1, 2]}), tmp_path / "set.parquet")
    with pytest.raises(DataError, match="the column caption holds int64, expected texts"):
        read_captions(f"{tmp_path}/set.parquet")
    (tmp_path / "set.parquet").write_bytes(b"PAR1" * 9)
    with pytest.raises(DataError, match="is no readable Parquet"):
        read_captions(f"{tmp_path}/set.parquet")
    (tmp_path / "set.jsonl").write_text('{"file_name": "a"}')
    with pytest.raises(DataError, match="line 1 is not"):
        read_captions(f"{tmp_path}/set.jsonl")


def test_addresses_in_the_place_of_captions_are_refused(tmp_path):
    lines = [f"a cat\thttps://host/{number}.jpg " for number in range(3)]
    (tmp_path / "set.tsv").write_text("\n".join([*lines, "see http://a.b", "no address\tof its own", ""]))
    message = "most lines have an address, such as 'https://host/0.jpg ', expected captions: .* cut -f1"
    with pytest.raises(DataError, match=message):
        read_captions(f"{tmp_path}/set.tsv")
    (tmp_path / "set.tsv").write_text("\n".join([*lines, "see http://a.b", "no", "one", ""]))
    assert len(read_captions(f"{tmp_path}/set.tsv")) == 6  # half of them are not most


def test_numbers_are_no_captions_beside_images_either(tmp_path):
    for values in ([1.0, float("nan")], [1, None]):
        pq.write_table(pa.table({"uri": ["/1", "/2"], "caption": values}), tmp_path / "set.parquet")
        with pytest.raises(DataError, match=r"the column caption holds (double|int64), expected texts"):
            open_captioned(f"pairs:{tmp_path}/set.parquet")
    texts = pa.array(["a cat", None]).dictionary_encode()
    pq.write_table(pa.table({"uri": ["/1", "/2"], "caption": texts}), tmp_path / "set.parquet")
    assert open_captioned(f"pairs:{tmp_path}/set.parquet").captions.texts == ("a cat",)


def test_pairs_gather_the_captions_of_an_image(tmp_path):
    rows = "uri,caption\n2.jpg,a dog\n1.jpg,a cat\n2.jpg,a cat\n3.jpg,\n2.jpg,a dog\n"
    (tmp_path / "set.csv").write_text(rows)
    found = open_captioned(f"pairs:{tmp_path}/set.csv")
    assert found.uris.to_pylist() == [f"{tmp_path}/2.jpg", f"{tmp_path}/1.jpg"]
    assert found.captions.texts == ("a dog", "a cat")
    assert [found.of_image.row(row).tolist() for row in range(2)] == [[0, 1], [1]]
    assert found.describe().startswith(
        "pairs set: 2 images, 2 captions (1 empty and 2 repeated ones left out"
    )
    (tmp_path / "set.csv").write_text(f"{rows},a cow\n")
    found = open_captioned(f"pairs:{tmp_path}/set.csv")
    assert (found.num_nowhere, len(found)) == (1, 2)
    assert found.describe().endswith("; 1 rows without a uri left out")


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
