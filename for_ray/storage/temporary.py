"""Temporary folders that leave nothing: those of a killed process go when the next one needs a folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = "for-ray-"
"""Of the folders' names in `$TMPDIR`."""

_NEW = "new-"
"""In front of the names of those that are just being made."""

_NEW_SECONDS = 24 * 3600.0
"""What is just being made is made within this time, or its process was killed."""

_LOCK, _FILES = "lock", "files"


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """An empty folder in `$TMPDIR` for the time of the block; first, those of dead processes are removed.

    Each folder lies beside a file that its process holds a lock on, which the kernel lets go of when the
    process dies, however it does: what can be locked is nobody's. A process id would say less, for another
    process may have it by now, or the process may be in another container.

    Raises:
        OSError: `$TMPDIR` cannot be written.
    """
    _remove_orphans(Path(tempfile.gettempdir()))
    made = Path(tempfile.mkdtemp(prefix=f"{_NEW}{PREFIX}"))
    with (made / _LOCK).open("w") as lock:
        with contextlib.suppress(OSError):  # a disk without locks: nobody else gets this one, either
            fcntl.flock(lock, fcntl.LOCK_EX)
        (made / _FILES).mkdir()
        # It has the name that others look for once it is locked: what is just being made is no orphan.
        home = made.rename(made.with_name(made.name.removeprefix(_NEW)))
        try:
            yield home / _FILES
        finally:
            _remove(home)


def _remove_orphans(parent: Path) -> None:
    for home in [*parent.glob(f"{PREFIX}*"), *parent.glob(f"{_NEW}{PREFIX}*")]:
        with contextlib.suppress(OSError):  # in use, for its lock is refused; gone by now; or none of these
            # Another user's runs remove their own; and a link that somebody laid here is not followed.
            if home.lstat().st_uid == os.getuid() and not home.is_symlink():
                _remove_orphan(home)


def _remove_orphan(home: Path) -> None:
    if home.name.startswith(_NEW):
        if time.time() - home.stat().st_mtime < _NEW_SECONDS:
            return
        with contextlib.suppress(OSError):  # it has its lock
            home.rmdir()
    with (home / _LOCK).open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if {each.name for each in home.iterdir()} <= {_LOCK, _FILES}:  # else somebody else's, of a like name
            _remove(home)


def _remove(home: Path) -> None:
    """The lock goes last: of a removal that is killed, too, the next process finds the rest."""
    shutil.rmtree(home / _FILES, ignore_errors=True)
    shutil.rmtree(home, ignore_errors=True)
