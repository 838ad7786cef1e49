from __future__ import annotations

import os
import pickle
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from for_ray.errors import DataError, StorageError
from for_ray.storage import (
    ConditionFailed,
    NotAnObject,
    ObjectChanged,
    ObjectGone,
    check_writable,
    delete,
    delete_tree,
    download,
    exists,
    list_objects,
    read_bytes,
    stat,
    upload,
    write_bytes,
)
from tests.rights import open_folder, without_rights

ODD_NAMES = [
    "a b.jpg",
    "a#b.jpg",
    "a%20b.jpg",
    "é 画像.jpg",
    "new\nline.jpg",
    "a?b&c=d+e.jpg",
    "'\"\\.jpg",
    ".hidden",
]


def listed(folder: Path) -> dict[str, str]:
    return {entry.uri: entry.etag for page in list_objects(str(folder)) for entry in page}


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_listed_and_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"content")
    [(uri, etag)] = listed(tmp_path).items()
    assert uri == str(tmp_path / name)
    assert read_bytes(uri, etag=etag) == b"content"


def test_names_that_are_no_text_are_listed_and_read(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.jpg"
    Path(os.fsdecode(path)).write_bytes(b"content")
    [(uri, etag)] = listed(tmp_path).items()
    assert read_bytes(uri, etag=etag) == b"content"


def test_listing_is_deep_and_paged(tmp_path):
    wanted = set()
    for number in range(1203):
        path = tmp_path / str(number % 7) / str(number % 3) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        wanted.add(str(path))
    pages = list(list_objects(str(tmp_path)))
    assert [len(page) for page in pages] == [1000, 203]
    assert {entry.uri for page in pages for entry in page} == wanted


def test_an_empty_folder_yields_nothing(tmp_path):
    assert list(list_objects(str(tmp_path))) == []


def test_each_folder_is_walked_once(tmp_path):
    (tmp_path / "root" / "deep").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "root" / "deep" / "a.jpg").touch()
    (tmp_path / "outside" / "b.jpg").touch()
    (tmp_path / "root" / "loop").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "1-again").symlink_to(tmp_path / "root" / "deep")
    (tmp_path / "root" / "2-out").symlink_to(tmp_path / "outside")
    (tmp_path / "root" / "3-out").symlink_to(tmp_path / "outside")
    (tmp_path / "root" / "c.jpg").symlink_to(tmp_path / "outside" / "b.jpg")
    (tmp_path / "root" / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "root" / "self.jpg").symlink_to(tmp_path / "root" / "self.jpg")
    found = {str(Path(uri).relative_to(tmp_path / "root")) for uri in listed(tmp_path / "root")}
    # Real folders win over links; of two links the first by name.
    assert found == {"deep/a.jpg", "2-out/b.jpg", "c.jpg"}


def test_pipes_and_devices_are_neither_listed_nor_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert listed(tmp_path) == {}
    for path in (tmp_path / "pipe.jpg", Path("/dev/zero"), tmp_path):
        with pytest.raises((DataError, StorageError), match=r"is not a file|is a folder"):
            read_bytes(str(path))


def test_a_path_that_no_file_can_have_says_why(tmp_path):
    (tmp_path / "circle.jpg").symlink_to(tmp_path / "circle.jpg")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.jpg"))
        for path, reason in (
            (tmp_path, "it is a folder, expected a file"),
            (tmp_path / "circle.jpg", "the links go round in a circle"),
            (tmp_path / "socket.jpg", "it is a socket or a device, expected a file"),
            (tmp_path / ("n" * 300), "the name is longer than the file system allows"),
            ("/n" * 3000, "the name is longer than the file system allows"),
            (tmp_path / "\ud800.jpg", "the name is no text"),
        ):
            with pytest.raises(NotAnObject, match=f"^cannot read .*: {reason}; .*") as caught:
                read_bytes(str(path))
            assert str(caught.value).isprintable()


def test_of_folders_that_may_not_be_listed_only_those_without_images_are_passed_over():
    with open_folder() as root:
        (root / "a.jpg").touch()
        for name in ("lost+found", ".Trash-0"):
            (root / name).mkdir(mode=0)
        with without_rights():
            assert set(listed(root)) == {str(root / "a.jpg")}
        (root / "february").mkdir(mode=0)
        with without_rights(), pytest.raises(StorageError, match=r"cannot list .*/february: permission is"):
            listed(root)
        (root / "february").rmdir()
        root.chmod(0)
        with without_rights(), pytest.raises(StorageError, match="permission is denied"):
            listed(root)
        root.chmod(0o755)


def test_etags_change_with_the_file(tmp_path):
    path = tmp_path / "a.jpg"
    etags = set()
    for content, time in ((b"1", 1), (b"1", 2), (b"12", 2)):
        path.write_bytes(content)
        os.utime(path, ns=(time, time))
        assert stat(str(path)).etag == listed(tmp_path)[str(path)]
        etags.add(stat(str(path)).etag)
    assert len(etags) == 3


def test_a_changed_file_is_refused(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"old")
    os.utime(path, ns=(1, 1))
    etag = stat(str(path)).etag
    path.write_bytes(b"new")
    with pytest.raises(ObjectChanged, match=r"a\.jpg has changed since it was listed"):
        read_bytes(str(path), etag=etag)


def test_a_foreign_etag_is_not_compared(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"content")
    assert read_bytes(str(tmp_path / "a.jpg"), etag="2026-11-22") == b"content"


def test_ranges(tmp_path):
    path = str(tmp_path / "a")
    write_bytes(path, b"0123456789")
    assert read_bytes(path, start=3, length=4) == b"3456"
    assert read_bytes(path, start=8) == b"89"
    assert read_bytes(path, length=2) == b"01"
    assert read_bytes(path, start=99, length=0) == b""
    with pytest.raises(DataError, match="ends too early: 2 bytes are missing"):
        read_bytes(path, start=8, length=4)
    with pytest.raises(DataError, match="is too large: 10 bytes, at most 9 are read"):
        read_bytes(path, max_bytes=9)
    assert len(read_bytes(path, max_bytes=10)) == 10


def test_conditional_writes(tmp_path):
    path = str(tmp_path / "new" / "a")
    first = write_bytes(path, b"1", if_absent=True)
    with pytest.raises(ConditionFailed, match="exists already"):
        write_bytes(path, b"2", if_absent=True)
    second = write_bytes(path, b"2", if_etag=first)
    with pytest.raises(ConditionFailed, match="somebody else"):
        write_bytes(path, b"3", if_etag=first)
    assert read_bytes(path) == b"2"
    delete(path)
    with pytest.raises(ConditionFailed, match="gone"):
        write_bytes(path, b"3", if_etag=second)


def test_fast_writes_of_one_size_never_share_an_etag(tmp_path):
    path = str(tmp_path / "a")
    etags = [write_bytes(path, b"0", if_absent=True)]
    for number in range(50):
        etags.append(write_bytes(path, str(number % 10).encode(), if_etag=etags[-1]))
    assert len(set(etags)) == 51


@pytest.mark.parametrize("kind", ["if_absent", "if_etag"])
def test_of_many_writers_one_wins(tmp_path, kind):
    path = str(tmp_path / "a")
    condition = {"if_absent": True} if kind == "if_absent" else {"if_etag": write_bytes(path, b"start")}
    barrier = threading.Barrier(8)

    def write(number: int) -> bool:
        barrier.wait()
        try:
            write_bytes(path, str(number).encode(), **condition)
        except ConditionFailed:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert won.count(True) == 1
    assert read_bytes(path) == str(won.index(True)).encode()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tiny_disk):
    path = tiny_disk / "a"
    write_bytes(str(path), b"old")
    with pytest.raises(StorageError, match=r"cannot write .*/a: no space is left on the disk; free space"):
        write_bytes(str(path), bytes(1 << 20))
    big = tiny_disk.parent / "big"
    big.write_bytes(bytes(1 << 20))
    with pytest.raises(StorageError, match="no space is left"):
        upload(big, str(path))
    assert path.read_bytes() == b"old"
    assert list(tiny_disk.iterdir()) == [path]


def test_a_full_disk_is_not_writable(tiny_disk):
    with pytest.raises(OSError, match="No space"):
        (tiny_disk / "filler").write_bytes(bytes(1 << 20))
    with pytest.raises(StorageError, match="no space is left"):
        check_writable(str(tiny_disk / "index"))


def test_checking_leaves_nothing(tmp_path):
    check_writable(str(tmp_path / "a" / "b"))
    check_writable(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for uri, reason in (
        (tmp_path / "file", "a file stands where a folder is expected"),
        (tmp_path / "file" / "index", "a file stands where a folder is expected"),
        (Path("/proc/index"), "there is no such file or folder|permission is denied"),
    ):
        with pytest.raises(StorageError, match=rf"cannot write .*: ({reason})") as caught:
            check_writable(str(uri))
        assert "\n" not in str(caught.value)


def test_what_is_missing_is_told(tmp_path):
    missing = str(tmp_path / "missing")
    with pytest.raises(StorageError, match=r"cannot list .*missing: there is no such file or folder"):
        list(list_objects(missing))
    for read in (read_bytes, stat, lambda uri: download(uri, tmp_path / "x")):
        with pytest.raises(ObjectGone, match="missing is not there"):
            read(missing)
    with pytest.raises(StorageError, match=r"cannot read .*missing: there is no such file"):
        upload(Path(missing), str(tmp_path / "x"))
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="a file stands where a folder is expected"):
        list(list_objects(str(tmp_path / "file")))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_existence(tmp_path):
    assert not exists(str(tmp_path / "a"))
    assert not exists(str(tmp_path))
    write_bytes(str(tmp_path / "a"), b"")
    assert exists(str(tmp_path / "a"))
    assert exists(str(tmp_path))
    assert not exists(str(tmp_path / "a" / "b"))


def test_deleting_is_done_when_nothing_is_there(tmp_path):
    write_bytes(str(tmp_path / "d" / "e" / "f"), b"")
    delete_tree(str(tmp_path / "d"))
    delete_tree(str(tmp_path / "d"))
    delete(str(tmp_path / "d"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match="root of the disk"):
        delete_tree("/")


def test_files_are_copied_whole(tmp_path):
    content = bytes(range(256)) * 1000
    (tmp_path / "source").write_bytes(content)
    upload(tmp_path / "source", str(tmp_path / "there" / "copy"))
    download(str(tmp_path / "there" / "copy"), tmp_path / "back" / "copy")
    assert (tmp_path / "back" / "copy").read_bytes() == content
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["copy"]


@pytest.mark.parametrize("kind", [ObjectGone, ObjectChanged, NotAnObject, ConditionFailed])
def test_errors_leave_a_worker(kind):
    again = pickle.loads(pickle.dumps(kind("a message")))
    assert type(again) is kind
    assert str(again) == "a message"
