"""The floor of recall: what is under it is not published, and the message says which setting to raise."""

from __future__ import annotations

import pytest

from for_ray.errors import StageError
from for_ray.schema import Codec
from for_ray.stages.verify import Recall, check_recall

CODEC = Codec(
    codec_id="0" * 16,
    file_name="codec.faiss",
    sha256="0" * 64,
    num_bytes=1,
    factory="IVF64,PQ4",
    dim=128,
    nlist=64,
    num_trained_on=9999,
)


def test_a_build_under_the_floor_is_refused_in_one_line_with_the_settings_to_change():
    with pytest.raises(StageError) as caught:
        check_recall(Recall(0.8371, 64), least=0.85, codec=CODEC)
    said = str(caught.value)
    assert said.startswith(
        "verify: recall@50 is 0.837, under min_recall 0.85; not published: more than 64 lists"
    )
    assert "IVF64,PQ4 is what loses it; raise the bits of --codec" in said
    assert said.endswith("or lower --min-recall")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("recall", "least", "codec"),
    [(0.85, 0.85, CODEC), (0.0, 0.0, CODEC), (None, 1.0, CODEC), (0.1, 0.9, None)],
)
def test_at_the_floor_or_where_there_is_nothing_to_find_it_passes(recall, least, codec):
    check_recall(Recall(recall, 1), least=least, codec=codec)
