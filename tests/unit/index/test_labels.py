"""The record of a table of pseudo-labels: read back, and held against other settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from for_ray.errors import ConfigError, DataError
from for_ray.index.labels import read_label_run, refuse_other_settings
from for_ray.schema import LabelLayout, LabelRun, labels_schema
from for_ray.storage import write_bytes

RUN = LabelRun(
    dataset="coco val",
    images_uri="s3://b/val",
    encoder="tiny",
    fingerprint="ab" * 8,
    backbone_fingerprint="cd" * 8,
    text_fingerprint="ef" * 8,
    head="cluster",
    num_slots=4,
    vocabulary="names.txt",
    vocabulary_sha256="0" * 64,
    num_names=3,
    exclude_novel=False,
    dropped_names=(),
    threshold=5e-4,
    num_labels=50,
    logit_scale=14.285714149475098,
    has_features=True,
    num_prefix=1,
    height=2,
    width=3,
    channels=8,
)


def test_a_record_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    layout = LabelLayout(f"{tmp_path}/")
    assert read_label_run(layout) is None
    write_bytes(layout.run_uri, RUN.model_dump_json().encode())
    assert read_label_run(layout) == RUN
    assert (layout.run_uri, layout.table_uri) == (f"{tmp_path}/labels.json", f"{tmp_path}/labels.lance")


def test_the_columns_follow_the_record() -> None:
    schema = labels_schema(RUN)
    assert schema.field("features").type.list_size == (1 + 2 * 3) * 8
    without = labels_schema(RUN.model_copy(update={"has_features": False}))
    assert without.names == [name for name in schema.names if name != "features"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{}", ["labels.json", "is no record of labels", "dataset"]),
        (b"\xff not json", ["labels.json", "is no record of labels"]),
        (RUN.model_copy(update={"format": 9}).model_dump_json().encode(), ["format 9", "expected 1"]),
    ],
)
def test_a_record_that_is_none_is_refused_in_one_line(
    tmp_path: Path, content: bytes, words: list[str]
) -> None:
    layout = LabelLayout(str(tmp_path))
    write_bytes(layout.run_uri, content)
    with pytest.raises(DataError) as caught:
        read_label_run(layout)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_other_settings_are_refused_and_named() -> None:
    same = {"threshold": 5e-4, "vocabulary_sha256": "0" * 64}
    refuse_other_settings(RUN, same, output_uri="s3://b/labels")
    with pytest.raises(ConfigError) as caught:
        refuse_other_settings(
            RUN, {**same, "threshold": 0.1, "vocabulary_sha256": "f" * 64}, output_uri="s3://b/labels"
        )
    assert str(caught.value) == (
        "s3://b/labels holds labels of other settings: threshold 0.0005, not 0.1, "
        "vocabulary_sha256 000000000000…, not ffffffffffff…; give another --output"
    )
