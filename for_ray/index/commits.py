"""Commits to Lance tables over a network that breaks them off.

Lance repeats every request that may be repeated, and when the answer to a commit is lost, it looks whether
its commit is in. But it gives up when the connection breaks before the store has come to the commit, since a
commit must not be made twice. Here it is known what a commit does, hence whether it is in.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

NUM_TRIES = 6

_LOST = ("HTTP error", "conflict")
"""In what Lance says of a connection that broke, and of a commit that an earlier try has forestalled."""

Result = TypeVar("Result")


def commit(act: Callable[[], Result], *, find: Callable[[], Result | None]) -> Result:
    """Commit, and if that breaks off, look whether it is in, and if it is not, commit again.

    Args:
        act: Commits onto the latest version, and raises what Lance raises.
        find: What `act` would have returned if its commit is in, else None; it may prepare for the next try.

    Raises:
        OSError, ValueError, RuntimeError: What `act` raised, if it was refused, or broke off again and again.
    """
    for attempt in range(1, NUM_TRIES + 1):
        try:
            return act()
        except (OSError, ValueError, RuntimeError) as error:
            is_lost = any(word in str(error) for word in _LOST)
            if is_lost:
                time.sleep(min(0.25 * 2**attempt, 5))  # the store may still be at it
            if (found := find()) is not None:
                return found
            if not is_lost or attempt == NUM_TRIES:
                raise
    raise AssertionError("unreachable")
