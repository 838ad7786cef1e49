"""When an index needs another codec than it has."""

from __future__ import annotations

import re

from for_ray.index.plan import IndexPlan
from for_ray.schema import Codec

GROWTH_OF_LISTS = 4
"""A codec is trained anew when the plan has this many times its lists. Lists grow with the root of the number
of vectors: the index has then grown sixteenfold, and its lists have become four times as long as planned."""


def is_outgrown(codec: Codec, plan: IndexPlan) -> bool:
    """Whether the plan is of another kind than the codec, or has `GROWTH_OF_LISTS` times as many lists."""
    return (
        codec_kind(codec.factory) != codec_kind(plan.factory) or plan.nlist >= GROWTH_OF_LISTS * codec.nlist
    )


def codec_kind(factory: str) -> str:
    """A factory string without what follows from the number of vectors: the lists, and how they are found."""
    return re.sub(r"IVF\d*(_HNSW\d*)?", "IVF", factory)
