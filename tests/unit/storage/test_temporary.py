"""Temporary folders of this process and of others, alive and killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from for_ray.storage import temporary, temporary_folder

HOLDER = """
import subprocess, sys, time
from for_ray.storage import temporary_folder
with temporary_folder() as folder:
    (folder / "spill.arrow").write_bytes(b"rows")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(folder, child.pid, flush=True)
    time.sleep(600)
"""
"""A process with a folder, and one that it started; as a run that has started Ray's processes."""


@pytest.fixture(autouse=True)
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `$TMPDIR` is."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process, and its folder."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        path, child = process.stdout.readline().split()
        yield process, Path(path)
        os.kill(int(child), signal.SIGKILL)
        process.kill()


def homes(parent: Path) -> set[str]:
    return {path.name for path in parent.iterdir()}


def test_a_folder_is_empty_and_leaves_with_the_block(parent: Path) -> None:
    with temporary_folder() as folder:
        (home,) = homes(parent)
        assert home.startswith("for-ray-")
        assert list(folder.iterdir()) == []
        (folder / "deeper").mkdir()
        (folder / "deeper" / "file").write_bytes(b"rows")
    assert homes(parent) == set()


def test_a_folder_leaves_when_its_block_fails(parent: Path) -> None:
    with pytest.raises(KeyboardInterrupt), temporary_folder():
        raise KeyboardInterrupt
    assert homes(parent) == set()


def test_folders_of_one_process_do_not_touch_each_other() -> None:
    with temporary_folder() as outer:
        (outer / "file").write_bytes(b"rows")
        with temporary_folder() as inner:
            assert inner != outer
        assert (outer / "file").read_bytes() == b"rows"


def test_a_killed_process_leaves_a_folder_that_the_next_one_removes(
    parent: Path, holder: tuple[subprocess.Popen[str], Path]
) -> None:
    process, path = holder
    with temporary_folder():
        assert (path / "spill.arrow").read_bytes() == b"rows"  # it lives
    process.kill()
    process.wait()
    assert path.exists()
    with temporary_folder() as folder:
        assert homes(parent) == {folder.parent.name}


def test_a_removal_that_was_killed_is_finished_by_the_next_one(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree

    def be_killed(*_: object, **__: object) -> None:
        raise SystemExit

    monkeypatch.setattr(shutil, "rmtree", be_killed)
    with pytest.raises(SystemExit), temporary_folder() as folder:
        (folder / "file").write_bytes(b"rows")
    (half,) = homes(parent)
    assert (parent / half / "lock").exists()
    monkeypatch.setattr(shutil, "rmtree", remove)
    with temporary_folder() as folder:
        assert homes(parent) == {folder.parent.name}


def test_what_is_just_being_made_is_no_orphan(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = temporary.fcntl.flock
    seen = []

    def look(file: object, how: int) -> None:
        # Another process looks at the last moment before the lock is held.
        if not seen:
            seen.append(how)
            temporary._remove_orphans(parent)
        lock(file, how)

    monkeypatch.setattr(temporary.fcntl, "flock", look)
    with temporary_folder() as folder:
        assert folder.is_dir()
    assert seen == [temporary.fcntl.LOCK_EX]


def test_what_is_not_this_users_or_not_ours_stays(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious = parent / "precious"
    for home in (precious, parent / "for-ray-others"):
        (home / "files").mkdir(parents=True)
        (home / "lock").touch()
    (parent / "for-ray-s3-of-a-test").mkdir()
    (parent / "for-ray-file").touch()
    before = homes(parent)
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    with temporary_folder():
        pass
    assert homes(parent) == before
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(parent))
    (parent / "for-ray-link").symlink_to(precious)
    with temporary_folder():
        pass
    assert homes(parent) == (before | {"for-ray-link"}) - {"for-ray-others"}
    assert homes(precious) == {"lock", "files"}


def test_a_folder_of_a_like_name_with_more_in_it_stays(parent: Path) -> None:
    for name in ("for-ray-notes", "new-for-ray-notes"):
        (parent / name / "files").mkdir(parents=True)
        for file in ("lock", "notes.txt", "files/precious"):
            (parent / name / file).touch()
        grow_old(parent / name)
    with temporary_folder():
        pass
    for name in ("for-ray-notes", "new-for-ray-notes"):
        assert homes(parent / name) == {"lock", "files", "notes.txt"}
        assert (parent / name / "files" / "precious").exists()


def grow_old(path: Path) -> None:
    """Let it be of two days ago."""
    then = time.time() - 2 * 24 * 3600
    os.utime(path, (then, then))


def test_what_was_killed_while_it_was_made_goes_once_it_is_old(parent: Path) -> None:
    for age in ("young", "old"):
        for made in ("empty", "lock", "files"):
            path = parent / f"new-for-ray-{age}-{made}"
            path.mkdir()
            if made != "empty":
                (path / "lock").touch()
            if made == "files":
                (path / "files").mkdir()
            if age == "old":
                grow_old(path)
    (parent / "new-for-ray-held").mkdir()
    with (parent / "new-for-ray-held" / "lock").open("w") as lock:
        temporary.fcntl.flock(lock, temporary.fcntl.LOCK_EX)
        grow_old(parent / "new-for-ray-held")
        with temporary_folder():
            pass
    young = {f"new-for-ray-young-{made}" for made in ("empty", "lock", "files")}
    assert homes(parent) == young | {"new-for-ray-held"}


def test_a_disk_without_locks_does_not_stop_anybody(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(temporary.fcntl, "flock", refuse)
    with temporary_folder() as outer, temporary_folder():
        assert outer.is_dir()
    assert homes(parent) == set()
