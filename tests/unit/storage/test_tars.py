from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from for_ray.errors import DataError
from for_ray.storage import ObjectChanged, ObjectGone, list_members, read_image, stat, tars


def write_tar(path: Path, members: dict[str, bytes], **settings: object) -> None:
    with tarfile.open(path, "w", **settings) as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))


def members_of(path: Path) -> list[tuple[str, str]]:
    return [(entry.uri, entry.etag) for entry in list_members(stat(str(path)))]


MEMBERS = {
    "0001.jpg": b"first",
    "empty.jpg": b"",
    "folder/with space/é#%.png": b"odd" * 1000,
    "n" * 150 + "/" + "m" * 150 + ".jpg": b"long name",
    "block.jpg": bytes(range(256)) * 2,
}


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_listed_and_read_as_tarfile_reads_them(tmp_path, kind):
    path = tmp_path / "a#b.tar"
    write_tar(path, MEMBERS, format=kind)
    found = {uri.removeprefix(f"{path}#"): read_image(uri, etag) for uri, etag in members_of(path)}
    with tarfile.open(path) as archive:
        assert found == {one.name: archive.extractfile(one).read() for one in archive}  # type: ignore[union-attr]
    assert found == MEMBERS


def test_only_regular_files_are_members(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("d", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE), ("f.jpg", tarfile.REGTYPE)):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "f.jpg"
            archive.addfile(header)
    assert [uri.partition("#")[2] for uri, _ in members_of(tmp_path / "a.tar")] == ["f.jpg"]


def test_a_tar_without_members_is_sound(tmp_path):
    write_tar(tmp_path / "a.tar", {})
    assert members_of(tmp_path / "a.tar") == []
    (tmp_path / "a.tar").write_bytes(b"")
    assert members_of(tmp_path / "a.tar") == []


def test_a_tar_that_was_replaced_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", MEMBERS)
    uri, etag = members_of(tmp_path / "a.tar")[0]
    write_tar(tmp_path / "a.tar", MEMBERS | {"one more": b""})
    with pytest.raises(ObjectChanged, match=r"a\.tar has changed"):
        read_image(uri, etag)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(ObjectGone, match=r"a\.tar is not there"):
        read_image(uri, etag)


@pytest.mark.parametrize("keep", [600, 2000, 5000])
def test_of_a_truncated_tar_the_sound_members_are_kept(tmp_path, keep):
    path = tmp_path / "a.tar"
    write_tar(path, {f"{n}.jpg": bytes([n]) * 700 for n in range(4)})  # 512 bytes of header, 1,024 of body
    path.write_bytes(path.read_bytes()[:keep])
    *members, (uri, etag) = members_of(path)
    assert [read_image(*member) for member in members] == [bytes([n]) * 700 for n in range(keep // 1536)]
    assert uri == str(path)
    with pytest.raises(DataError, match=rf"a\.tar is damaged: .* byte {keep // 1536 * 1536} "):
        read_image(uri, etag)


def test_a_tar_may_lack_its_end_blocks(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, {f"{n}.jpg": bytes([n]) * 700 for n in range(4)})
    path.write_bytes(path.read_bytes()[: 4 * 1536])
    assert [read_image(*member) for member in members_of(path)] == [bytes([n]) * 700 for n in range(4)]


@pytest.mark.parametrize("damage", [b"\xff" * 512, b"x" * 100 + b"\0" * 412])
def test_a_damaged_header_in_the_middle_is_told(tmp_path, damage):
    path = tmp_path / "a.tar"
    write_tar(path, {f"{n}.jpg": bytes([n]) * 700 for n in range(4)})
    content = bytearray(path.read_bytes())
    content[3072 : 3072 + 512] = damage
    path.write_bytes(content)
    *members, (uri, etag) = members_of(path)
    assert len(members) == 2
    with pytest.raises(DataError, match="damaged: what lies behind byte 3072 "):
        read_image(uri, etag)


@pytest.mark.parametrize("content", [b"no tar at all" * 100, gzip.compress(bytes(10_000))])
def test_what_is_no_tar_is_told(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    [(uri, etag)] = members_of(tmp_path / "a.tar")
    with pytest.raises(DataError, match="damaged: what lies behind byte 0 "):
        read_image(uri, etag)


def test_of_a_tar_that_looks_like_a_member_the_reason_is_told(tmp_path):
    write_tar(tmp_path / "a.tar#b.tar", MEMBERS)
    [(uri, etag)] = members_of(tmp_path / "a.tar#b.tar")
    assert uri == str(tmp_path / "a.tar#b.tar")
    with pytest.raises(
        DataError, match=r"b\.tar has \.tar# in its name: that marks members of a tar; rename"
    ):
        read_image(uri, etag)


def test_whole_objects_are_read_even_with_a_member_like_name(tmp_path):
    (tmp_path / "a.tar#b.jpg").write_bytes(b"whole")
    entry = stat(str(tmp_path / "a.tar#b.jpg"))
    assert read_image(entry.uri, entry.etag) == b"whole"
    assert read_image(entry.uri, "") == b"whole"


def test_a_member_etag_without_a_tar_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"names no \.tar file"):
        read_image(str(tmp_path / "a.jpg"), "etag@512+10")


def test_huge_images_are_not_read(tmp_path):
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(tars.MAX_IMAGE_BYTES + 1)
    with pytest.raises(DataError, match=f"at most {tars.MAX_IMAGE_BYTES} are read"):
        read_image(str(tmp_path / "a.jpg"), "")
    with pytest.raises(DataError, match="at most 5 are read"):
        read_image(str(tmp_path / "a.tar#b.jpg"), "etag@0+6", max_bytes=5)


def test_a_tar_that_vanishes_while_it_is_listed_is_told(tmp_path):
    write_tar(tmp_path / "a.tar", MEMBERS)
    entry = stat(str(tmp_path / "a.tar"))
    (tmp_path / "a.tar").unlink()
    with pytest.raises(ObjectGone, match=r"a\.tar is not there"):
        list(list_members(entry))
