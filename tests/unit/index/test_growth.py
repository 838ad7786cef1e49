"""When a codec has to be trained anew."""

from __future__ import annotations

import pytest

from for_ray.index.growth import codec_kind, is_outgrown
from for_ray.index.plan import plan_index
from for_ray.schema import Codec


def codec(factory: str, nlist: int) -> Codec:
    return Codec(
        codec_id="c",
        file_name="f",
        sha256="0",
        num_bytes=1,
        factory=factory,
        dim=64,
        nlist=nlist,
        num_trained_on=1,
    )


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("IVF16,Flat", "IVF,Flat", True),
        ("RR64,IVF1024,RaBitQ4", "RR64,IVF65536_HNSW32,RaBitQ4", True),
        ("IVF16,Flat", "IVF16,SQ8", False),
        ("RR64,IVF16,RaBitQ4", "IVF16,RaBitQ4", False),
        ("IVF16,RaBitQ4", "IVF16,RaBitQ2", False),
    ],
)
def test_the_number_of_lists_makes_no_other_kind(one, other, is_same):
    assert (codec_kind(one) == codec_kind(other)) is is_same


def test_an_index_may_grow_sixteenfold():
    small, large, larger = (plan_index(count, 64, codec="IVF,SQ8") for count in (40_000, 250_000, 700_000))
    trained = codec(small.factory, small.nlist)
    assert not is_outgrown(trained, small)
    assert not is_outgrown(trained, large)
    assert is_outgrown(trained, larger)


def test_from_flat_to_codes_when_it_is_no_longer_small():
    small, large = plan_index(9_000, 64), plan_index(11_000, 64)
    assert is_outgrown(codec(small.factory, small.nlist), large)
