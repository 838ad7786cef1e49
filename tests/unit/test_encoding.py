"""Passes of the encode stage: which crashes may end a run, and what is left for the next pass."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from for_ray.errors import StageError
from for_ray.index import table
from for_ray.pipeline import encoding
from for_ray.pipeline.encoding import encode_gap
from for_ray.schema import LISTING_SCHEMA, WorkTime, images_schema
from for_ray.stages import diff
from for_ray.stages import encode as stage
from for_ray.stages.blocks import EncodeCounts
from for_ray.stages.diff import write_gap
from for_ray.stages.failures import DEAD_ENCODER, NEVER_STARTED, RESULTS_LOST, UNREACHABLE
from for_ray.storage import Lease, Spill

OF_PROCESS = "Worker unexpectedly exits"
NUM_IMAGES = 12


class Passes:
    """Encode stages that store some rows each, skip others, and may crash; how they were asked."""

    def __init__(self, home: Path, *passes: tuple[int, str | None] | tuple[int, str | None, int]) -> None:
        self._home, self._passes = home, list(passes)
        self.why = "gone"
        self.were_there: list[list[str]] = []
        self.were_apart: list[bool] = []
        self.asked: list[list[str]] = []

    def encode(self, images, gap, *, num_images, is_apart, on_progress, **_):
        num_stored, crash, *rest = self._passes.pop(0)
        uris = sorted(pq.read_table(gap)["uri"].to_pylist())
        assert len(uris) == num_images
        self.asked.append(uris)
        there = [*self._home.glob("gap/rest-*"), *self._home.glob("work/*")]
        self.were_there.append([path.name for path in there])
        self.were_apart.append(is_apart)
        schema = images_schema(4)
        columns = {field.name: pa.nulls(num_stored, field.type) for field in schema}
        columns["uri"] = columns["etag"] = pa.array(uris[:num_stored])
        for name in ("vectors", "boxes"):
            columns[name] = pa.array([[]] * num_stored, schema.field(name).type)
        images = table.append(images, table.write_fragments(pa.table(columns, schema=schema), images.uri))
        on_progress(num_stored)
        work = WorkTime(
            read_seconds=1, wait_seconds=0, encode_seconds=0, write_seconds=0, num_actors=1, has_gpus=False
        )
        counts = EncodeCounts(stored=num_stored, **{self.why: sum(rest)})
        return stage.Encoded(images, counts, work, crash)


@pytest.fixture(autouse=True)
def _few_objects() -> Iterator[None]:
    """Each pass collects garbage, which would look at all that the tests before have left in this process."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def run(tmp_path, monkeypatch):
    def start(*passes: tuple[int, str | None] | tuple[int, str | None, int]):
        made = Passes(tmp_path, *passes)
        monkeypatch.setattr(stage, "encode", made.encode)
        listed = Spill(tmp_path / "listed", LISTING_SCHEMA)
        uris = [f"image-{number:02}" for number in range(NUM_IMAGES)]
        listed.add(pa.record_batch([uris, uris, [1] * NUM_IMAGES], schema=LISTING_SCHEMA))
        listed.finish()
        gap = write_gap(listed, [], folder=tmp_path / "diff", gap_uri=str(tmp_path / "gap"))
        told: list[int] = []
        given = {"job": None, "pool": None, "commit_seconds": 1.0, "most_bad": 9, "lease": lease}
        images = table.create_table(str(tmp_path / "images.lance"), images_schema(4))
        where = {"work_uri": str(tmp_path / "gap"), "folder": tmp_path / "work"}
        return (
            lambda **more: encode_gap(images, gap, **where, on_progress=told.append, **(given | more)),
            made,
            told,
        )

    with Lease.acquire(str(tmp_path / "lease.json"), "test") as lease:
        yield start


@pytest.fixture
def rows_per_file(monkeypatch):
    def set_to(number: int) -> None:
        monkeypatch.setattr(diff, "ROWS_PER_FILE", number)
        monkeypatch.setattr(encoding, "ROWS_PER_FILE", number)

    return set_to


def test_nodes_that_go_while_work_is_done_may_be_as_many_as_they_like(run):
    passes = [(2, UNREACHABLE), (1, RESULTS_LOST), (2, NEVER_STARTED), (2, RESULTS_LOST), (2, RESULTS_LOST)]
    start, made, told = run(*passes, (3, None))
    encoded = start()
    assert encoded.counts == EncodeCounts(stored=NUM_IMAGES)
    assert encoded.work.read_seconds == 6
    assert made.were_apart == [False] * 6
    assert [len(uris) for uris in made.asked] == [12, 10, 9, 7, 5, 3]
    assert sorted(encoded.table.to_table(["uri"])["uri"].to_pylist()) == made.asked[0]
    assert told == [2, 3, 5, 7, 9, 12]


def test_an_encoder_that_cannot_be_reached_at_its_first_image_twice_is_a_dead_one(run):
    start, _, _ = run((4, UNREACHABLE), (0, UNREACHABLE), (0, UNREACHABLE))
    with pytest.raises(StageError, match="died 4 times at the same images") as caught:
        start(stage="label")
    assert caught.value.stage == "label"
    assert DEAD_ENCODER in str(caught.value)


def test_the_next_node_may_go_before_it_has_stored_an_image(run):
    start, _, _ = run((4, UNREACHABLE), (0, UNREACHABLE), (3, UNREACHABLE), (0, UNREACHABLE), (5, None))
    assert start().counts == EncodeCounts(stored=NUM_IMAGES)


def test_results_that_are_lost_before_an_image_is_stored_may_be_an_images_doing(run):
    start, made, _ = run((4, RESULTS_LOST), (0, RESULTS_LOST), (8, None))
    assert start().counts == EncodeCounts(stored=NUM_IMAGES)
    assert made.were_apart == [False, False, True]


def test_a_process_that_dies_has_images_decoded_apart_and_ends_the_run_the_fourth_time_in_vain(run):
    start, made, _ = run((1, UNREACHABLE), (1, OF_PROCESS), (1, NEVER_STARTED), *[(0, OF_PROCESS)] * 4)
    message = f"in 4 attempts that stored nothing, though no image is to blame: {OF_PROCESS}"
    with pytest.raises(StageError, match=message):
        start()
    assert made.were_apart == [False, False, True, True, True, True, True]


def test_processes_may_die_as_often_as_images_were_stored_between(run):
    start, made, told = run(*[(1, OF_PROCESS), (0, OF_PROCESS), (0, NEVER_STARTED)] * 6, (6, None))
    assert start().counts == EncodeCounts(stored=NUM_IMAGES)
    assert made.were_apart == [False, *[True] * 18]
    assert told[-1] == NUM_IMAGES


def test_only_the_first_file_of_what_is_left_is_decoded_apart(run, rows_per_file):
    """Behind a second crash two are, at once, since what was being read may have lain in the second."""
    rows_per_file(2)
    start, made, told = run(
        (2, OF_PROCESS), (2, None), (1, OF_PROCESS), (1, UNREACHABLE), (4, None), (2, None)
    )
    encoded = start()
    assert encoded.counts == EncodeCounts(stored=NUM_IMAGES)
    assert encoded.work.read_seconds == 6
    assert made.were_apart == [False, True, False, True, True, False]
    assert [len(uris) for uris in made.asked] == [12, 2, 8, 4, 4, 2]
    assert made.asked[1] == made.asked[0][2:4]
    assert told == [2, 4, 5, 6, 10, 12]
    assert sorted(encoded.table.to_table(["uri"])["uri"].to_pylist()) == made.asked[0]


def test_a_crash_behind_much_that_was_stored_has_one_file_decoded_apart_again(run, rows_per_file):
    rows_per_file(2)
    start, made, _ = run((2, OF_PROCESS), (2, None), (4, OF_PROCESS), (2, None), (2, None))
    assert start().counts == EncodeCounts(stored=NUM_IMAGES)
    assert made.were_apart == [False, True, False, True, False]
    assert [len(uris) for uris in made.asked] == [12, 2, 8, 2, 2]


def test_what_is_stored_apart_is_not_in_vain(run, rows_per_file):
    """An image kills its process before the encoders are there to store any: passes over all store none."""
    rows_per_file(1)
    start, made, _ = run(*[(0, OF_PROCESS), (1, None)] * 4, (0, OF_PROCESS), (8, None))
    assert start().counts == EncodeCounts(stored=NUM_IMAGES)
    assert made.were_apart == [False, True] * 5
    assert [len(uris) for uris in made.asked] == [12, 1, 11, 2, 10, 4, 9, 8, 8, 8]


def test_an_encoder_out_of_reach_before_and_behind_what_was_stored_apart_is_not_dead(run, rows_per_file):
    rows_per_file(2)
    start, made, _ = run((0, OF_PROCESS), (0, UNREACHABLE), (2, None), (0, UNREACHABLE), (10, None))
    assert start().counts == EncodeCounts(stored=NUM_IMAGES)
    assert made.were_apart == [False, True, True, False, False]


@pytest.mark.parametrize(
    ("most_bad", "expected", "num_passes"),
    [(1, EncodeCounts(stored=3, gone=2), 2), (2, EncodeCounts(stored=NUM_IMAGES), 3)],
)
def test_more_bad_images_apart_than_may_be_end_the_stage(run, rows_per_file, most_bad, expected, num_passes):
    """The caller refuses them; no further pass comes before."""
    rows_per_file(3)
    start, made, _ = run((2, OF_PROCESS), (1, None, 2), (9, None))
    assert start(most_bad=most_bad).counts == expected
    assert len(made.asked) == num_passes


def test_only_the_last_rest_stays_on_this_disk_and_in_the_store(run):
    start, made, _ = run(*[(2, UNREACHABLE)] * 4, (4, None))
    start()
    assert made.were_there == [[], ["rest-1"], ["rest-2"], ["rest-3"], ["rest-4"]]


def test_nothing_is_deleted_without_the_lease(run):
    class Lost:
        def check(self) -> None:
            raise StageError("lease", "was lost to another run")

    start, made, _ = run((2, UNREACHABLE), (2, UNREACHABLE), (8, None))
    with pytest.raises(StageError, match="was lost"):
        start(lease=Lost())
    assert made.were_there == [[], ["rest-1"]]


@pytest.mark.parametrize("why", ["gone", "changed", "denied"])
def test_images_that_are_skipped_are_counted_once_though_they_are_met_apart_too(run, rows_per_file, why):
    rows_per_file(3)
    start, made, _ = run((2, OF_PROCESS), (1, None, 2), (7, None, 2))
    made.why = why
    assert start().counts == EncodeCounts(stored=10, **{why: 2})
    assert [len(uris) for uris in made.asked] == [12, 3, 9]


def test_nodes_that_go_before_anything_is_done_end_the_run_the_fourth_time(run):
    start, made, _ = run(*[(0, NEVER_STARTED)] * 4)
    with pytest.raises(StageError, match="in 4 attempts that stored nothing"):
        start()
    assert made.were_apart == [False] * 4


def test_a_crash_behind_the_last_image_is_none(run):
    start, _, _ = run((NUM_IMAGES, OF_PROCESS))
    assert start().crash is None
