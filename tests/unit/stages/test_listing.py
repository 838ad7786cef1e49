from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from for_ray.errors import DataError, StorageError
from for_ray.schema import LISTING_SCHEMA
from for_ray.stages import listing
from for_ray.stages.listing import Listing, write_listing
from for_ray.storage import read_image, spill, stat


def fill(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(name))


def write_tar(path: Path, *names: str) -> None:
    with tarfile.open(path, "w") as archive:
        for name in names:
            header = tarfile.TarInfo(name)
            header.size = len(name)
            archive.addfile(header, io.BytesIO(name.encode()))


def rows_of(listed: Listing) -> list[dict[str, object]]:
    parts = [listed.rows.part(number) for number in range(listed.rows.num_parts)]
    return sorted(pa.concat_tables(parts).to_pylist(), key=lambda row: row["uri"])


def names_of(listed: Listing, folder: Path) -> set[str]:
    return {str(row["uri"]).removeprefix(f"{folder}/") for row in rows_of(listed)}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


def test_a_folder_gives_its_images_with_etag_and_size(images, tmp_path):
    names = [
        "a.jpg",
        "deep/er/b.JPEG",
        "c d#%é\n.png",
        "e.webp",
        "f.TIF",
        "g.heic",
        "h.avif",
        "i.bmp",
        "j.gif",
    ]
    fill(images, *names)
    listed = write_listing(str(images), tmp_path / "rows")
    assert names_of(listed, images) == set(names)
    assert listed.num_listed == len(names)
    assert (listed.num_ignored, listed.ignored) == (0, None)
    assert listed.metadata == pa.schema([])
    for row in rows_of(listed):
        assert row == stat(str(row["uri"]))._asdict()
        assert read_image(row["uri"], row["etag"]).decode() == str(row["uri"]).removeprefix(f"{images}/")


def test_other_files_and_hidden_ones_are_counted(images, tmp_path):
    fill(images, "a.jpg", "b.txt", "c", ".d.jpg", ".hidden/e.jpg", "f.jpg.bak", "g.parquet", "h.tar.gz")
    listed = write_listing(str(images), tmp_path / "rows")
    assert names_of(listed, images) == {"a.jpg"}
    assert listed.num_ignored == 7
    assert listed.ignored.removeprefix(f"{images}/") in {
        "b.txt",
        "c",
        ".d.jpg",
        ".hidden/e.jpg",
        "f.jpg.bak",
    } | {"h.tar.gz"}


def test_manifests_beside_images_are_ignored(images, tmp_path):
    fill(images, "a.jpg", "m.parquet")
    listed = write_listing(str(images), tmp_path / "rows")
    assert (listed.num_listed, listed.num_ignored, listed.ignored) == (1, 1, str(images / "m.parquet"))


def test_a_hidden_root_is_listed(tmp_path):
    fill(tmp_path / ".images", "a.jpg")
    listed = write_listing(str(tmp_path / ".images"), tmp_path / "rows")
    assert names_of(listed, tmp_path / ".images") == {"a.jpg"}


def test_names_that_are_no_text_are_ignored(images, tmp_path):
    fill(images, "a.jpg", "b\udcff.jpg")
    listed = write_listing(str(images), tmp_path / "rows")
    assert names_of(listed, images) == {"a.jpg"}
    assert listed.num_ignored == 1


def test_relative_folders_and_file_uris_give_absolute_paths(images, tmp_path, monkeypatch):
    fill(images, "a.jpg")
    monkeypatch.chdir(tmp_path)
    for number, uri in enumerate(("images", "./images/", f"file://{images}")):
        listed = write_listing(uri, tmp_path / str(number))
        assert [row["uri"] for row in rows_of(listed)] == [str(images / "a.jpg")]


def test_tars_give_the_images_in_them(images, tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "NUM_TAR_READERS", 2)
    for number in range(5):
        write_tar(images / f"{number}.tar", f"{number}.jpg", f"{number}.txt", f"x/{number}.png", "x/._y.png")
    fill(images, "plain.jpg")
    listed = write_listing(str(images), tmp_path / "rows")
    inside = {f"{n}.tar#{name}" for n in range(5) for name in (f"{n}.jpg", f"x/{n}.png")}
    assert names_of(listed, images) == inside | {"plain.jpg"}
    assert listed.num_ignored == 10
    for row in rows_of(listed):
        name = str(row["uri"]).rpartition("#")[2].removeprefix(f"{images}/")
        assert read_image(row["uri"], row["etag"]) == name.encode()
        assert row["size_bytes"] == len(name)


def test_one_tar_is_a_source_too(images, tmp_path):
    write_tar(images / "a.tar", "b.jpg")
    listed = write_listing(str(images / "a.tar"), tmp_path / "rows")
    assert names_of(listed, images) == {"a.tar#b.jpg"}


def test_a_damaged_tar_is_a_row_that_cannot_be_read(images, tmp_path):
    write_tar(images / "a.tar", "b.jpg", "c.jpg")
    (images / "a.tar").write_bytes((images / "a.tar").read_bytes()[:1100])
    rows = rows_of(write_listing(str(images), tmp_path / "rows"))
    assert [str(row["uri"]).removeprefix(f"{images}/") for row in rows] == ["a.tar", "a.tar#b.jpg"]
    with pytest.raises(DataError, match=r"a\.tar is damaged: what lies behind byte 1024 "):
        read_image(rows[0]["uri"], rows[0]["etag"])


def test_a_tar_with_an_odd_name_does_not_keep_others_from_being_listed(images, tmp_path):
    write_tar(images / "a.tar#1.tar", "b.jpg")
    write_tar(images / "c.tar", "b.jpg")
    listed = write_listing(str(images), tmp_path / "rows")
    assert names_of(listed, images) == {"a.tar#1.tar", "c.tar#b.jpg"}


def test_of_members_of_one_name_the_last_is_listed_as_tar_extracts_it(images, tmp_path):
    images.mkdir(parents=True, exist_ok=True)
    with tarfile.open(images / "a.tar", "w") as archive:
        for content in (b"first", b"second"):
            header = tarfile.TarInfo("b.jpg")
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    [row] = rows_of(write_listing(str(images), tmp_path / "rows"))
    assert read_image(row["uri"], row["etag"]) == b"second"


def write_manifest(path: Path, *uris: str, **columns: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"uri": list(uris), "etag": ["e"] * len(uris), **columns}), path)


def test_a_manifest_is_taken_at_its_word(tmp_path):
    write_manifest(tmp_path / "m.parquet", "s3://b/x.jpg", "/nowhere/y", camera=["left", None])
    listed = write_listing(str(tmp_path / "m.parquet"), tmp_path / "rows")
    assert listed.metadata == pa.schema([("camera", pa.string())])
    assert rows_of(listed) == [
        {"uri": "/nowhere/y", "etag": "e", "size_bytes": None, "camera": None},
        {"uri": "s3://b/x.jpg", "etag": "e", "size_bytes": None, "camera": "left"},
    ]
    assert listed.rows.schema.names == [*LISTING_SCHEMA.names, "camera"]


def test_a_column_without_a_value_is_not_of_the_metadata(tmp_path):
    columns = {
        "nothing": pa.nulls(2),
        "void": pa.nulls(2, pa.float64()),
        "tags": [[], []],
        "camera": ["x", None],
    }
    write_manifest(tmp_path / "m.parquet", "/a.jpg", "/b.jpg", **columns)
    listed = write_listing(str(tmp_path / "m.parquet"), tmp_path / "rows")
    assert listed.metadata == pa.schema([("camera", pa.string())])


def test_metadata_is_of_the_types_that_are_known(tmp_path):
    write_manifest(tmp_path / "m.parquet", "/a.jpg", "/b.jpg", score=[1.0, None])
    known = pa.schema([("score", pa.int32())])
    listed = write_listing(str(tmp_path / "m.parquet"), tmp_path / "rows", known=known)
    assert listed.metadata == known
    assert [row["score"] for row in rows_of(listed)] == [1, None]


@pytest.mark.parametrize("name", ["parts", "m.parquet"])
def test_a_folder_of_manifests(tmp_path, name):
    for number in range(3):
        write_manifest(tmp_path / name / f"part-{number}.parquet", f"/{number}.jpg")
    fill(tmp_path / name, "_SUCCESS", ".part-0.crc")
    listed = write_listing(str(tmp_path / name), tmp_path / "rows")
    assert [row["uri"] for row in rows_of(listed)] == ["/0.jpg", "/1.jpg", "/2.jpg"]
    assert listed.num_ignored == 2


def test_too_many_manifests_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "MAX_MANIFESTS", 2)
    for number in range(3):
        write_manifest(tmp_path / "parts" / f"part-{number}.parquet", f"/{number}.jpg")
    with pytest.raises(DataError, match="holds 3 manifests, more than 2"):
        write_listing(str(tmp_path / "parts"), tmp_path / "rows")


def test_many_images_are_parted_and_none_is_lost(images, tmp_path, monkeypatch):
    monkeypatch.setattr(spill, "BUFFER_ROWS", 300)
    monkeypatch.setattr(spill, "NUM_PARTS", 8)
    fill(images, *(f"{number % 9}/{number}.jpg" for number in range(2500)))
    seen: list[int] = []
    listed = write_listing(str(images), tmp_path / "rows", progress=seen.append)
    assert listed.rows.num_parts == spill.NUM_PARTS
    assert names_of(listed, images) == {f"{number % 9}/{number}.jpg" for number in range(2500)}
    assert listed.num_listed == 2500
    assert seen == [1000, 2000, 2500]


def test_sources_without_images_are_told(images, tmp_path):
    def reason(uri: Path) -> str:
        with pytest.raises((DataError, StorageError)) as caught:
            write_listing(str(uri), tmp_path / "rows")
        assert str(caught.value).isprintable()
        return str(caught.value).replace(str(tmp_path), "")

    assert reason(images / "x") == ("cannot list /images/x: there is no such file or folder; check the path")
    assert reason(images).startswith(
        "there are no images in /images: found nothing; expected files like .jpg"
    )
    fill(images, "a.txt", "b.tar.gz", "c", ".d.jpg")
    assert reason(images).startswith(
        "there are no images in /images: found 4 of other kinds (.gz, .jpg, .txt, no suffix); expected files"
    )
    assert reason(images / "a.txt") == (
        "cannot list /images/a.txt: a file stands where a folder is expected; check the path"
    )
    write_manifest(tmp_path / "m.parquet")
    assert (
        reason(tmp_path / "m.parquet") == "the manifest /m.parquet has no rows; expected at least one image"
    )
    assert not (tmp_path / "rows").exists()
