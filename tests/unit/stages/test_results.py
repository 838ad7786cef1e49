"""What an evaluation prints: JSON of three shapes, a CSV, tables."""

from __future__ import annotations

import csv
import io
import json
import math

import numpy as np
import pytest

from for_ray.datasets.labelled import CategoryShare
from for_ray.evaluation.summary import GroupMeans, MultilabelScores
from for_ray.stages.results import Evaluation, Method, print_evaluation

SHARES = [
    CategoryShare("fire, hydrant", "base", 3, 0.3),
    CategoryShare("cat [small]", "novel", 0, 0.0),
    CategoryShare("dog", "novel", 1, 0.1),
]


def method(name: str, *, offset: float = 0.0, multilabel: MultilabelScores | None = None) -> Method:
    aps = np.array([0.25, math.nan, 0.5]) + offset
    means = GroupMeans(base=0.25 + offset, novel=0.5 + offset, all=0.375 + offset)
    return Method(name, {"encoder": name, "head": "clip"}, means, aps, multilabel)


def evaluation(*methods: Method, index: dict[str, object] | None = None) -> Evaluation:
    return Evaluation("coco small", 10, 2, SHARES, list(methods), index)


ABOUT = {
    "dataset": "coco small",
    "images": 10,
    "images_left_out": 2,
    "categories": 3,
    "categories_without_images": 1,
}


def test_json_of_one_encoder():
    labels = MultilabelScores(gzsl_f1=0.5, gzsl_map=0.4, zsl_f1=None, zsl_map=0.3)
    found = evaluation(method("a", multilabel=labels)).to_json()
    assert found == {
        "map50": {"base": 0.25, "novel": 0.5, "all": 0.375},
        "multilabel": {"gzsl_f1": 0.5, "gzsl_map": 0.4, "zsl_f1": None, "zsl_map": 0.3},
        "encoder": "a",
        "head": "clip",
        **ABOUT,
    }
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_json_of_several_encoders():
    found = evaluation(method("a"), method("b", offset=0.125)).to_json()
    assert [each["encoder"] for each in found["encoders"]] == ["a", "b"]
    assert found["encoders"][1]["map50"]["base"] == 0.375
    assert {key: found[key] for key in ABOUT} == ABOUT
    assert "map50" not in found


def test_json_of_an_index():
    index = {"recall_at_50": 0.9, "snapshot": 3}
    found = evaluation(method("index"), method("exact search", offset=0.125), index=index).to_json()
    assert found["map50"]["novel"] == 0.5
    assert found["exact"]["map50"]["novel"] == 0.625
    assert (found["recall_at_50"], found["snapshot"]) == (0.9, 3)


def test_csv():
    rows = list(csv.reader(io.StringIO(evaluation(method("a")).to_csv())))
    assert rows == [
        ["category", "group", "images", "ap50"],
        ["fire, hydrant", "base", "3", "0.250000"],
        ["cat [small]", "novel", "0", ""],
        ["dog", "novel", "1", "0.500000"],
    ]
    several = list(csv.reader(io.StringIO(evaluation(method("a"), method("b", offset=0.125)).to_csv())))
    assert several[0] == ["category", "group", "images", "ap50 a", "ap50 b"]
    assert several[1][3:] == ["0.250000", "0.375000"]


@pytest.mark.parametrize("most_rows", [2, 100])
def test_tables(monkeypatch, most_rows):
    monkeypatch.setattr("for_ray.stages.results.MOST_ROWS", most_rows)
    stream = io.StringIO()
    labels = MultilabelScores(gzsl_f1=0.5, gzsl_map=0.4, zsl_f1=None, zsl_map=0.3)
    print_evaluation(evaluation(method("a[b]/c", multilabel=labels)), stream)
    lines = [line.split() for line in stream.getvalue().splitlines()]
    assert ["a[b]/c", "25.00", "50.00", "37.50", "50.00", "40.00", "–", "30.00"] in lines
    assert (["dog", "novel", "1", "10.00%", "50.00"] in lines) == (most_rows == 100)
    assert (["cat", "[small]", "novel", "0", "0.00%", "–"] in lines) == (most_rows == 100)
    text = stream.getvalue()
    assert "2 images of the data set were left out: not there, or unreadable" in text
    assert "1 categories without an image are in no mean" in text


def test_tables_of_an_index_say_what_it_loses():
    stream = io.StringIO()
    index = {"recall_at_50": 0.91234, "nprobe": 4}
    print_evaluation(evaluation(method("index"), method("exact search"), index=index), stream)
    assert "recall at 50: 0.9123\n" in stream.getvalue()
    assert "nprobe: 4\n" in stream.getvalue()
    assert "2 images of the data set were left out: not in the index" in stream.getvalue()
