"""A plan as a table and as JSON: every figure with its unit, and what to change in a line."""

from __future__ import annotations

import io
import json

import pytest

from for_ray.index.capacity import Capacity, Nodes, plan_capacity
from for_ray.stages.plan_report import _hours, _seconds, print_plan, print_plans

GB = 10**9


def capacity_of(num_vectors: int, dim: int = 128, **wanted: object) -> Capacity:
    nodes = Nodes(64 * GB, 16, wanted.pop("nodes", None))
    return plan_capacity(num_vectors, dim, vectors_per_image=8, nodes=nodes, **wanted)


def printed(capacity: Capacity, *, as_json: bool = False) -> str:
    stream = io.StringIO()
    print_plan(capacity, json=as_json, stream=stream)
    return stream.getvalue()


def rows_of(text: str) -> dict[str, list[str]]:
    """Cells by a line's name; names that come twice have the last one's."""
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    return {cells[0]: cells[1:] for cells in lines if cells}


def test_a_billion_vectors_as_people_read_them():
    text = printed(capacity_of(10**9, nodes=4))
    rows = rows_of(text)
    assert rows["vectors"][0] == "1,000,000,000"
    assert rows["images"][0] == "125,000,000"
    assert rows["codec"][0] == "HR,IVF32768,RaBitQ4"
    assert rows["in all"][0] == "359 GB"
    assert rows["memory of a node"][0] == "64 GB"
    assert rows["copies served"][0] == "2"
    assert rows["by the network alone"] == ["2 min", "vectors read, segments written; 0.625 GB/s a node"]
    assert rows["to merge once"][0] == "1 min"
    lines = [line for line in text.splitlines()[1:-1] if not line.startswith("—")]
    assert all(len(rows_of(line).popitem()[1]) == 2 for line in lines)  # each figure says what it means
    assert max(map(len, text.splitlines()[:-1])) <= 110
    assert "a task of 4.29 GB trains 32,768 lists, the vectors want 65,536" in text.splitlines()[-1]


def test_what_does_not_fit_is_said_in_the_table_and_below_it():
    text = printed(capacity_of(10**10, 1024, nodes=10))
    assert rows_of(text)["copies served"][0] == "0: does not fit"
    assert "\ndoes not fit: 10 nodes of 64 GB hold 10% of it; take 102 of them" in text


def test_json_is_the_plan_on_one_line():
    capacity = capacity_of(10**6)
    text = printed(capacity, as_json=True)
    assert text.count("\n") == 1
    found = json.loads(text)
    assert found["plan"]["num_vectors"] == 10**6
    assert found["bytes_on_store"] == capacity.bytes_on_store
    assert Capacity.model_validate_json(text) == capacity


def test_two_plans_stand_beside_each_other_each_with_its_advice():
    stream = io.StringIO()
    plans = {"now": capacity_of(1000), "10⁹ vectors": capacity_of(10**9)}
    print_plans(plans, stream)
    rows = rows_of(stream.getvalue())
    assert rows["vectors"][:2] == ["1,000", "1,000,000,000"]
    assert stream.getvalue().splitlines()[-1].startswith("10⁹ vectors: a task of 4.29 GB trains")


def test_a_code_that_was_not_measured_says_so():
    rows = rows_of(printed(capacity_of(10**6, codec="PCA8,IVF,RaBitQ4")))
    assert rows["recall@50 of the code"][0] == "not measured"
    assert rows["to build"][0] == "under 1 min"
    rows = rows_of(printed(capacity_of(10**6, codec="IVF,SQ8")))
    assert rows["recall@50 of the code"][0] == "not measured"
    assert rows["to build"][0] == "not measured"


@pytest.mark.parametrize(
    ("hours", "text"),
    [(None, "not measured"), (0.01, "under 1 min"), (0.5, "30 min"), (2.04, "2.0 h"), (1234.4, "1,234 h")],
)
def test_hours(hours, text):
    assert _hours(hours) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(1e-6, "under 1 ms"), (0.0042, "4.2 ms"), (0.26, "260 ms"), (1234.0, "1,234 s")]
)
def test_seconds(seconds, text):
    assert _seconds(seconds) == text
