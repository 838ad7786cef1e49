"""When a codec has to be trained anew, and that it is not trained twice for the same reason."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from for_ray.index.codec import codec_record, codec_to_bytes, train_codec
from for_ray.index.growth import (
    codec_kind,
    is_measured_for,
    list_imbalance,
    why_retrain,
    why_retrain_snapshot,
)
from for_ray.index.plan import IndexPlan, plan_index
from for_ray.index.segment import build_segment
from for_ray.schema import Codec, Segment, Snapshot, SnapshotRecord


def codec(plan: IndexPlan, **known: float | str | None) -> Codec:
    return codec_record(b"content", plan, num_trained_on=1).model_copy(update=known)


def segment(num_vectors: int, imbalance: float = 1.0) -> Segment:
    return Segment(
        segment_id="s",
        codec_id="c",
        file_name="f",
        sha256="0",
        num_bytes=1,
        num_vectors=num_vectors,
        first_image_id=0,
        end_image_id=1,
        imbalance=imbalance,
    )


def why(
    trained: Codec,
    plan: IndexPlan,
    segments: Sequence[Segment] = (),
    *,
    wanted: str | None = None,
    recall: float | None = None,
    floor: float = 0.95,
) -> str | None:
    return why_retrain(trained, plan, segments, wanted=wanted, recall=recall, floor=floor)


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
    assert why(codec(small), small, wanted="IVF,SQ8") is None
    assert why(codec(small), large, wanted="IVF,SQ8") is None
    assert why(codec(small), larger, wanted="IVF,SQ8") == "700,000 vectors want 2048 lists, it has 512"
    assert why(codec(larger), larger, wanted="IVF,SQ8") is None


def test_from_flat_to_codes_when_it_is_no_longer_small():
    small, large = plan_index(9_000, 64), plan_index(11_000, 64)
    assert why(codec(small), large) == "HR,IVF,RaBitQ4 takes the place of IVF,Flat"


def test_around_the_limit_an_index_keeps_its_codes():
    """Above 10,000 vectors it gets codes, and Flat again only when there are 5,000 left."""
    trained, trainings = codec(plan_index(9_000, 64)), []
    for count in (10_100, 9_900, 10_100, 9_000, 5_001, 10_500, 4_900, 5_100, 9_000, 10_001):
        plan = plan_index(count, 64)
        if why(trained, plan):
            trained = codec(plan)
            trainings.append(count)
    assert trainings == [10_100, 4_900, 10_001]


def test_what_the_user_asks_for_comes_at_once():
    coded = codec(plan_index(11_000, 64))
    assert why(coded, plan_index(9_000, 64, codec="IVF,Flat"), wanted="IVF,Flat") is not None
    assert why(coded, plan_index(9_000, 64)) is None
    asked_for = codec(plan_index(9_000, 64, codec="HR,IVF,RaBitQ4"), wanted="HR,IVF,RaBitQ4")
    assert why(asked_for, plan_index(9_000, 64), wanted=None) is not None  # back to what the plan chooses


def test_another_number_of_lists_is_asked_for_once():
    plan = plan_index(100_000, 8, codec="IVF64,SQ8")
    before = codec(plan_index(100_000, 8, codec="IVF256,SQ8"), wanted="IVF256,SQ8")
    assert why(before, plan, wanted="IVF64,SQ8") == "IVF64,SQ8 takes the place of IVF256,SQ8"
    assert why(codec(plan, wanted="IVF64,SQ8"), plan, wanted="IVF64,SQ8") is None
    small = plan_index(1000, 8, codec="IVF256,SQ8")  # which has fewer than were asked for
    assert small.nlist < 256
    assert why(codec(small, wanted="IVF256,SQ8"), small, wanted="IVF256,SQ8") is None
    assert why(codec(small, wanted="IVF,SQ8"), small, wanted="IVF256,SQ8") is None


@pytest.mark.parametrize(
    ("recall", "measured_for", "target", "is_enough"),
    [
        (0.97, 0.95, 0.95, True),
        (0.97, 0.95, 0.98, False),
        (0.97, 0.98, 0.98, True),  # more lists did not find more
        (0.99, 0.95, 0.98, True),
        (0.90, None, 0.95, False),
        (None, None, 0.95, True),
    ],
)
def test_a_target_that_was_raised_is_measured_again(recall, measured_for, target, is_enough):
    known = SnapshotRecord.model_construct(recall_at_50=recall, target_recall=measured_for)
    assert is_measured_for(known, target) == is_enough


def test_a_higher_target_takes_more_bits_and_a_lower_one_leaves_them():
    coded = codec(plan_index(20_000, 64))
    assert coded.factory.endswith("RaBitQ4")
    finer, coarser = (plan_index(20_000, 64, target_recall=target) for target in (0.999, 0.9))
    assert why(coded, finer, floor=0.999) == "HR,IVF,RaBitQ8 takes the place of HR,IVF,RaBitQ4"
    assert coarser.factory.endswith("RaBitQ3")
    assert why(coded, coarser, floor=0.9) is None


def test_recall_under_the_floor_that_the_codec_had_reached():
    plan = plan_index(20_000, 64)
    good = codec(plan, recall_at_50=0.97)
    assert why(good, plan, recall=0.93) == "recall@50 was 0.970, is 0.930, under 0.95"
    assert why(good, plan, recall=0.945) is None  # by as much measurements differ
    assert why(good, plan, recall=None) is None
    assert why(good, plan, recall=0.96, floor=0.99) is None  # never reached
    assert why(codec(plan, recall_at_50=0.90), plan, recall=0.80) is None
    assert why(codec(plan), plan, recall=0.80) is None


def test_a_codec_that_never_reaches_the_floor_is_trained_once():
    plan, trained, num_trained = plan_index(20_000, 64), codec(plan_index(20_000, 64), recall_at_50=0.97), 0
    for _ in range(10):
        if why(trained, plan, recall=0.90):
            num_trained += 1
            trained = codec(plan, recall_at_50=0.90)  # what the new one is measured at
    assert num_trained == 1


def test_imbalance_twice_what_it_was():
    plan = plan_index(20_000, 64)
    trained = codec(plan, imbalance=1.5)
    at_random = plan.nlist / 20_000
    assert why(trained, plan, [segment(20_000, 2.9 + at_random)]) is None
    assert why(trained, plan, [segment(20_000, 3.1 + at_random)]) == (
        "the images have drifted: its lists' imbalance was 1.50, is 3.10"
    )
    assert why(trained, plan, [segment(20_000, 1.5), segment(6_000, 9.0)]) is not None  # by vectors
    assert why(trained, plan, [segment(20_000, 1.5), segment(2_000, 9.0)]) is None
    assert why(codec(plan), plan, [segment(20_000, 9.0)]) is None  # never measured


def test_few_vectors_do_not_tell():
    assert list_imbalance([], 8) is None
    assert list_imbalance([segment(0), segment(1, 8.0)], 8) is None
    assert list_imbalance([segment(9_999, 2.0)], 8) is None
    assert list_imbalance([segment(20_000)], 8) is None  # not measured
    assert list_imbalance([segment(5_000, 2.0), segment(5_000, 3.0)], 8) == pytest.approx(2.5, rel=1e-3)
    assert list_imbalance([segment(20_000, 2.0), segment(500, 60.0)], 1024) == pytest.approx(1.95, rel=1e-2)
    assert list_imbalance([segment(20_000, 1.01)], 1024) == 1.0


class Drifting:
    """A codec for vectors around 20 centres, and segments on it of vectors around some of them.

    Args:
        folder: For files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.random = np.random.default_rng(0)
        self.centres = self.random.normal(size=(20, 16))
        self.plan = plan_index(20_000, 16, codec="IVF64,SQ8")
        self.num_built = 0

    def draw(self, count: int, centres: Sequence[int] = range(20)) -> NDArray[np.float32]:
        chosen = self.centres[self.random.choice(centres, count)]
        vectors = chosen + 0.4 * self.random.normal(size=(count, 16))
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def train(self, vectors: NDArray[np.float32]) -> Codec:
        content = codec_to_bytes(train_codec(vectors, self.plan, threads=1))
        (self.folder / "codec").write_bytes(content)
        return codec_record(content, self.plan, num_trained_on=len(vectors), wanted="IVF64,SQ8")

    def build(self, vectors: NDArray[np.float32]) -> Segment:
        ids = 256 * np.arange(self.num_built, self.num_built + len(vectors))
        self.num_built += len(vectors)
        built = build_segment(self.folder / "codec", [(ids, vectors)], self.folder / "segment", threads=1)
        return segment(built.num_vectors, built.imbalance)


@pytest.fixture
def drifting(tmp_path: Path) -> Drifting:
    return Drifting(tmp_path)


def test_vectors_that_drift_are_seen_and_mended_once(drifting):
    old = drifting.draw(10_000)
    trained = drifting.train(old)
    segments = [drifting.build(old)]
    trained = trained.model_copy(update={"imbalance": list_imbalance(segments, trained.nlist)})
    assert trained.imbalance < 1.7
    # More of the same, in small segments: no drift.
    segments += [drifting.build(drifting.draw(600)) for _ in range(5)]
    assert why(trained, drifting.plan, segments, wanted="IVF64,SQ8") is None
    # Two of the twenty subjects take over.
    new = drifting.draw(15_000, [3, 7])
    segments.append(drifting.build(new))
    reason = why(trained, drifting.plan, segments, wanted="IVF64,SQ8")
    assert reason is not None
    assert reason.startswith("the images have drifted")
    every = np.concatenate([old, new])
    retrained = drifting.train(every)
    segments = [drifting.build(every)]
    imbalance = list_imbalance(segments, retrained.nlist)
    assert imbalance < 1.7  # as equal as it was
    retrained = retrained.model_copy(update={"imbalance": imbalance})
    assert why(retrained, drifting.plan, segments, wanted="IVF64,SQ8") is None


def test_the_measure_is_the_same_for_large_and_small_segments(drifting, monkeypatch):
    drifting.train(drifting.draw(5_000))
    large, small = drifting.build(drifting.draw(30_000)), drifting.build(drifting.draw(600))
    monkeypatch.setattr("for_ray.index.growth.LEAST_VECTORS", 100)
    assert small.imbalance > large.imbalance + 0.05
    assert list_imbalance([small], 64) == pytest.approx(list_imbalance([large], 64), abs=0.05)


@pytest.fixture
def snapshot() -> Callable[..., Snapshot]:
    def make(num_vectors: int, trained: Codec | None, segments: list[Segment]) -> Snapshot:
        return Snapshot(
            snapshot_id=1,
            created_at=datetime.datetime.now(datetime.UTC),
            fingerprint="0",
            images_version=1,
            codec=trained,
            segments=segments,
            deleted_image_ids=[],
            nprobe=1,
            listed=1,
            indexed=1,
            quarantined=0,
            num_vectors=num_vectors,
            recall_at_50=0.9,
        )

    return make


def test_a_snapshot_tells_by_itself(snapshot):
    trained = codec(plan_index(20_000, 64), recall_at_50=0.97, imbalance=1.5)
    kept = snapshot(20_000, trained, [segment(20_000, 1.6)])
    assert why_retrain_snapshot(kept, wanted=None, floor=0.9) is None
    assert "recall@50" in why_retrain_snapshot(kept, wanted=None, floor=0.95)
    drifted = snapshot(20_000, trained, [segment(20_000, 5)])
    assert "drifted" in why_retrain_snapshot(drifted, wanted=None, floor=0.9)
    assert "IVF,SQ8 takes" in why_retrain_snapshot(kept, wanted="IVF,SQ8", floor=0.9)
    assert why_retrain_snapshot(snapshot(0, trained, []), wanted=None, floor=0.9) is None
    assert why_retrain_snapshot(snapshot(0, None, []), wanted=None, floor=0.9) is None
