"""Page tokens: where an answer ended, so that the next page goes on behind it."""

from __future__ import annotations

import base64
import binascii
import json
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from for_ray.errors import ConfigError

_RUNGS = (64, 256, 1024, 4096, 10_001)
"""Images that a ranking has: one more than an answer shows at least, to know whether there is another page.
All pages inside a rung are cut from one and the same ranking, whatever their size: had a page of ten
candidates of its own, an image could come twice, or never."""


MAX_TOKEN_LETTERS = 300
"""Of a token; those that are given have some 120."""

MAX_SCORE = 1.01
"""Of a hit: a cosine, but for rounding."""


class PageEnd(NamedTuple):
    """The last hit of a page.

    Attributes:
        snapshot_id: Which state of the index it came from.
        key: Of the question, as `Question.key` has it.
        num_shown: Hits of this page and those before it.
        score: Of the last hit; float32.
        image_id: Likewise.
    """

    snapshot_id: int
    key: str
    num_shown: int
    score: float
    image_id: int

    def token(self) -> str:
        """As text that survives a shell and a url."""
        return base64.urlsafe_b64encode(json.dumps(list(self)).encode()).decode().rstrip("=")


def read_token(token: str) -> PageEnd:
    """The end that a token stands for.

    Raises:
        ConfigError: It is none.
    """
    try:
        whole = token if len(token) <= MAX_TOKEN_LETTERS else ""
        values = json.loads(base64.b64decode(whole + "=" * (-len(whole) % 4), altchars=b"-_", validate=True))
        kinds = (int, str, int, float, int)
        if isinstance(values, list) and list(map(type, values)) == list(kinds):
            end = PageEnd(*values)
            if end.num_shown > 0 and abs(end.score) <= MAX_SCORE:
                return end
    except (ValueError, binascii.Error):
        pass
    raise ConfigError("the page is no token of an answer: take `next_page` as the answer before gave it")


def check_page(end: PageEnd, *, snapshot_id: int, key: str) -> None:
    """Whether a page goes on with this question in this snapshot.

    Raises:
        ConfigError: It is of another one.
    """
    if end.snapshot_id != snapshot_id:
        found = f"the page is of snapshot {end.snapshot_id}, and snapshot {snapshot_id} is asked"
        raise ConfigError(f"{found}: ask snapshot {end.snapshot_id}, or begin with the first page")
    if end.key != key:
        raise ConfigError("the page is of another question: ask as before, or begin with the first page")


def is_behind(end: PageEnd, scores: NDArray[np.float32], image_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which images of a ranking come after the end."""
    last = np.float32(end.score)
    return np.asarray((scores < last) | ((scores == last) & (image_ids > end.image_id)))


def depths(num_wanted: int) -> tuple[int, ...]:
    """How deep to rank for this many hits and one more, and how deep if that was not enough."""
    return tuple(rung for rung in _RUNGS if rung > num_wanted) or _RUNGS[-1:]
