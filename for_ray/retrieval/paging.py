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
candidates of its own, an image could come twice, or never. A deeper ranking looks further, and may find
images that rank before what was shown: they stand first on the page that goes to the next rung."""

MAX_TOKEN_LETTERS = 600
"""Of a token; those that are given have 120 to 400."""

MAX_SCORE = 1.01
"""Of a hit: a cosine, but for rounding."""


class Reached(NamedTuple):
    """How far a ranking was shown.

    Attributes:
        depth: Images that the ranking has, at most.
        score: Of the last hit that was shown of it; float32.
        image_id: Likewise.
    """

    depth: int
    score: float
    image_id: int

    def passed(self, scores: NDArray[np.float32], image_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The ids of a ranking up to the last hit, shown or not."""
        last = np.float32(self.score)
        is_behind = (scores < last) | ((scores == last) & (image_ids > self.image_id))
        return np.asarray(image_ids[~is_behind])


class PageEnd(NamedTuple):
    """Where a page ended.

    Attributes:
        snapshot_id: Which state of the index it came from.
        key: Of the question, as `Question.key` has it.
        num_shown: Hits of this page and those before it.
        reached: In each ranking that the pages came from, from the shallowest to that of this page.
    """

    snapshot_id: int
    key: str
    num_shown: int
    reached: tuple[Reached, ...]

    @property
    def depth(self) -> int:
        """Of the ranking that the page came from."""
        return self.reached[-1].depth

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
        snapshot_id, key, num_shown, reached = values
        end = PageEnd(snapshot_id, key, num_shown, tuple(Reached(*each) for each in reached))
        if _is_sound(end):
            return end
    except (ValueError, TypeError, binascii.Error):
        pass
    raise ConfigError("the page is no token of an answer: take `next_page` as the answer before gave it")


def _is_sound(end: PageEnd) -> bool:
    depths = [each.depth for each in end.reached]
    return (
        list(map(type, end[:3])) == [int, str, int]
        and end.num_shown > 0
        and all(list(map(type, each)) == [int, float, int] for each in end.reached)
        and all(abs(each.score) <= MAX_SCORE for each in end.reached)
        and 0 < len(depths) <= len(_RUNGS)
        and depths == sorted({*depths} & {*_RUNGS})
    )


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


def depths(num_wanted: int, *, begun: int = 0) -> tuple[int, ...]:
    """How deep to rank for this many hits and one more, and how deep if that was not enough.

    Args:
        num_wanted: Hits of the page and of those before it.
        begun: How deep the page before had to rank.
    """
    return tuple(rung for rung in _RUNGS if rung > num_wanted and rung >= begun) or _RUNGS[-1:]
