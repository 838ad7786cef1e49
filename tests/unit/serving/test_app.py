"""The HTTP API over a real index: what each route answers."""

import io
import json
import threading
from base64 import b64decode, b64encode
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from for_ray.errors import StorageError
from for_ray.index import conjunction
from for_ray.retrieval import OpenIndex, Question
from tests.unit.serving.conftest import EVIL, MIDDLE, SIZE, Served


def picture(size: tuple[int, int] = (80, 60), form: str = "PNG") -> bytes:
    written = io.BytesIO()
    Image.new("RGB", size, "red").save(written, form)
    return written.getvalue()


def ids(answer: dict[str, Any]) -> list[int]:
    return [hit["image_id"] for hit in answer["hits"]]


def test_words_are_answered_as_the_index_answers_them(client: TestClient, served: Served) -> None:
    answer = client.post("/search", json={"text": "a dog", "k": 3}).json()
    with served.service.current.lease() as index:
        expected = index.ask(Question("a dog", k=3)).to_json()
    assert ids(answer) == [0, 1, 2]
    first = answer["hits"][0]
    assert (first["width"], first["height"]) == SIZE
    assert first["box"] == pytest.approx(MIDDLE, abs=1e-4)
    assert first["score"] == pytest.approx(0.9, abs=2e-3)
    assert first["found"] == [{"name": "a dog", "score": first["score"], "slot": 0, "box": first["box"]}]
    assert set(answer["seconds"]) == {"encode", "filter", "faiss", "rank", "search", "total"}
    for each in (answer, expected):
        del each["seconds"]
    answer["hits"] = [
        {k: v for k, v in hit.items() if k not in ("width", "height")} for hit in answer["hits"]
    ]
    assert answer == expected
    sizes = client.post("/search", json={"text": "a dog", "filters": {"image_ids": [5]}}).json()["hits"][0]
    assert (sizes["width"], sizes["height"]) == (None, None)


def test_pages_go_on_and_end(client: TestClient) -> None:
    body: dict[str, Any] = {"text": "a dog", "k": 3}
    found: list[int] = []
    while True:
        answer = client.post("/search", json=body).json()
        found += ids(answer)
        if answer["next_page"] is None:
            break
        body["page"] = answer["next_page"]
    assert found == [0, 1, 2, 3, 5, 6, 7, 8]
    assert "no more" in answer["reason"]


def test_a_question_that_few_images_answer_ends_at_the_services_bound(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conjunction, "FEW_IMAGES", 0)
    monkeypatch.setattr(conjunction, "num_candidates", lambda k: 2)
    body = {"text": "a dog NOT a cat", "k": 2, "unwanted_above": -1.0}
    whole = served.client().post("/search", json=body).json()
    assert (whole["num_looked_at"], whole["is_exhaustive"]) == (8, True)
    with served.client(max_looked_at=5) as client:
        answer = client.post("/search", json=body).json()
        exported = client.post("/export", json={"format": "jsonl", "question": body})
    assert (answer["hits"], answer["num_looked_at"]) == ([], 5)
    assert (answer["is_complete"], answer["is_exhaustive"], answer["next_page"]) == (False, False, None)
    assert answer["reason"].startswith("no images: the search ended after 5 images, and others may answer")
    assert (exported.status_code, exported.content) == (200, b"")


def test_a_name_that_is_too_long_is_told(client: TestClient) -> None:
    refused = client.post("/search", json={"text": "a dog NOT " + "woof " * 150})
    assert (refused.status_code, refused.json()["code"]) == (400, "request")
    assert refused.json()["error"].startswith("the name 'woof woof")
    assert "77 tokens" in refused.json()["error"]


def test_a_page_of_another_snapshot_is_told_apart(client: TestClient) -> None:
    page = client.post("/search", json={"text": "a dog", "k": 3}).json()["next_page"]
    values = json.loads(b64decode(page + "==", altchars=b"-_"))
    assert values[0] == 1
    other = b64encode(json.dumps([17, *values[1:]]).encode(), altchars=b"-_").decode().rstrip("=")
    refused = client.post("/search", json={"text": "a dog", "k": 3, "page": other})
    assert (refused.status_code, refused.json()["code"]) == (409, "snapshot_changed")
    assert "snapshot 17" in refused.json()["error"]
    refused = client.post("/search", json={"text": "a cat", "k": 3, "page": page})
    assert (refused.status_code, refused.json()["code"]) == (400, "request")


def test_a_question_names_the_snapshot_that_answers(client: TestClient) -> None:
    body = {"text": "a dog", "k": 3}
    plain = client.post("/search", json=body).json()
    named = client.post("/search", json={**body, "snapshot_id": 1}).json()
    assert named["hits"] == plain["hits"]
    for path, given in (
        ("/search", {**body, "snapshot_id": 7}),
        ("/search", {"like": "2", "snapshot_id": 7}),
        ("/export", {"format": "csv", "question": {**body, "snapshot_id": 7}}),
        ("/export", {"format": "csv", "question": {**body, "snapshot_id": 7}, "image_ids": [1]}),
    ):
        refused = client.post(path, json=given)
        assert (refused.status_code, refused.json()["code"]) == (409, "snapshot_changed"), path
        assert "snapshot 7 is asked for, and snapshot 1 is served now" in refused.json()["error"]
    both = client.post("/search", json={**body, "page": plain["next_page"], "snapshot_id": 7})
    assert (both.status_code, both.json()["code"]) == (400, "request")
    assert "leave snapshot_id out" in both.json()["error"]
    again = client.post("/search", json={**body, "page": plain["next_page"], "snapshot_id": 1})
    assert ids(again.json()) == [3, 5, 6]
    for wrong in (0, -1, 1.5, "1", 1 << 60):
        assert client.post("/search", json={**body, "snapshot_id": wrong}).status_code == 400


@pytest.mark.parametrize("form", ["csv", "jsonl", "coco"])
def test_an_exported_file_says_of_which_snapshot_it_is(client: TestClient, form: str) -> None:
    asked = {"format": form, "question": {"text": "a dog", "snapshot_id": 1}}
    answer = client.post("/export", json=asked)
    assert answer.headers["for-ray-snapshot"] == "1"
    if form == "coco":
        assert answer.json()["info"]["snapshot_id"] == 1


def test_filters_thresholds_and_pictures(client: TestClient, served: Served) -> None:
    def asked(**body: Any) -> list[int]:
        return ids(client.post("/search", json=body).json())

    assert asked(text="a dog", filters={"glob": "*/[12].jpg"}) == [1, 2]
    assert asked(text="a dog", filters={"under": f"{served.folder}/6"}) == [6]
    assert asked(text="a dog", filters={"where": "width = 200 and starts_with(uri, '/')"}, k=1) == [0]
    assert asked(text="a dog", filters={"image_ids": [3, 2, 77]}) == [2, 3]
    assert asked(text="a dog", min_score=0.65) == [0, 1, 2]
    image = b64encode(picture()).decode()
    assert len(asked(image=image)) == 8
    assert len(asked(image=image, region=[0.0, 0.0, 0.5, 1.0], k=2)) == 2


def test_similar_objects(client: TestClient) -> None:
    answer = client.get("/similar/2/0", params={"k": 2}).json()
    assert ids(answer)[0] == 2
    assert answer["hits"][0]["score"] == pytest.approx(1.0, abs=1e-3)
    same = client.post("/search", json={"like": "2:0", "k": 2}).json()
    assert same["hits"] == answer["hits"]
    assert client.get("/similar/2/0", params={"min_score": 1.0}).json()["reason"]
    assert client.get("/similar/4/0").json()["error"].startswith("image 4 is not in this snapshot")


@pytest.mark.parametrize(("region", "slot"), [((0.0, 0.1, 0.35, 1.0), 1), ((0.65, 0.2, 1.0, 0.9), 2)])
def test_a_region_of_an_indexed_image_is_its_slot_that_fits_best(
    client: TestClient, region: tuple[float, ...], slot: int
) -> None:
    found = client.post("/search", json={"like": "2", "region": region, "k": 3}).json()
    assert found["hits"] == client.post("/search", json={"like": f"2:{slot}", "k": 3}).json()["hits"]
    assert found["next_page"] != client.post("/search", json={"like": "2", "k": 3}).json()["next_page"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"like": "2:1", "region": (0, 0, 1, 1)}, "give IMAGE_ID alone with the region"),
        ({"like": "2", "region": (0.5, 0, 0.5, 1)}, "0 <= x0 < x1 <= 1"),
        ({"like": "4", "region": (0, 0, 1, 1)}, "image 4 is not in this snapshot"),
        ({"like": "x", "region": (0, 0, 1, 1)}, "'x' is no object of the index"),
        ({"text": "a dog", "region": (0, 0, 1, 1)}, "a region is one of a picture"),
    ],
)
def test_regions_that_are_none_are_refused(client: TestClient, body: dict[str, Any], words: str) -> None:
    refused = client.post("/search", json=body)
    assert (refused.status_code, refused.json()["code"]) == (400, "request")
    assert words in refused.json()["error"]


@pytest.mark.parametrize(
    ("body", "position"),
    [({"text": "a dog AND"}, 9), ({"text": "a (dog"}, 2), ({"text": ""}, 0), ({"text": "NOT a dog"}, 4)],
)
def test_a_question_that_does_not_parse_has_a_place(
    client: TestClient, body: dict[str, Any], position: int
) -> None:
    refused = client.post("/search", json=body)
    assert refused.status_code == 400
    assert (refused.json()["code"], refused.json()["position"]) == ("question", position)
    assert "\n" not in refused.json()["error"]


def test_objects_of_an_image(client: TestClient, served: Served) -> None:
    objects = client.get("/images/3/objects").json()
    assert objects["uri"] == str(served.folder / EVIL)
    assert (objects["width"], objects["height"], objects["snapshot_id"]) == (*SIZE, 1)
    assert [slot["slot"] for slot in objects["slots"]] == [0, 1, 2]
    assert objects["slots"][0]["box"] == pytest.approx(MIDDLE, abs=1e-4)
    assert objects["columns"] == {"size_bytes": None, "encoded_at": None}
    for absent in (4, 99):
        refused = client.get(f"/images/{absent}/objects")
        assert (refused.status_code, refused.json()["code"]) == (404, "not_found")


def test_about_snapshots_and_health(client: TestClient, served: Served) -> None:
    about = client.get("/about").json()
    assert (about["name"], about["snapshot_id"], about["num_images"], about["num_vectors"]) == (
        "photos", 1, 8, 24,
    )  # fmt: skip
    assert about["head"] == "cluster"
    assert about["examples"] == ["a dog"]
    assert about["limits"]["max_k"] == 1000
    assert "uri" in about["columns"]
    listed = client.get("/snapshots").json()
    assert listed["current"] == 1
    fingerprint = served.planted.bundle.fingerprint
    assert listed["snapshots"] == [
        {
            "snapshot_id": 1, "created_at": "2026-01-01T00:00:00+00:00", "encoder": fingerprint, "indexed": 8,
            "vectors": 24, "recall": None,
        }
    ]  # fmt: skip
    health = client.get("/healthz")
    assert health.status_code == 200
    told = health.json()
    assert told.pop("age_seconds") > 0  # of a snapshot of 2026-01-01
    assert told == {"status": "ok", "snapshot_id": 1, "stale": None}


def test_the_page_and_its_files(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["cache-control"] == "no-cache"
    script = client.get("/page/api.js")
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"
    assert (
        client.get("/page/api.js", headers={"If-None-Match": script.headers["etag"]}).content
        == script.content
    )
    for absent in ("none.js", "..%2fapp.py", "%2e%2e%2fapp.py", "api.js.bak", "API.JS", "index.html%00.js"):
        assert client.get(f"/page/{absent}").status_code == 404
    assert client.get("/docs").status_code == 404


def test_openapi_names_every_route_and_its_answers(client: TestClient) -> None:
    described = client.get("/openapi.json").json()
    assert set(described["paths"]) == {
        "/search", "/similar/{image_id}/{slot}", "/images/{image_id}", "/images/{image_id}/objects",
        "/export", "/thumbnails/{image_id}", "/snapshots", "/about", "/session", "/healthz", "/metrics",
    }  # fmt: skip
    search = described["paths"]["/search"]["post"]["responses"]
    assert search["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/AnswerBody")
    assert search["default"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody")
    for path in described["paths"].values():
        assert all("422" not in route["responses"] for route in path.values())


def test_wrong_paths_and_methods_are_refused_in_one_form(client: TestClient) -> None:
    missing, wrong = client.get("/nothing"), client.get("/search")
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
    assert (wrong.status_code, wrong.json()["code"]) == (405, "request")


def test_a_store_that_is_away_is_an_answer(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(self: OpenIndex, question: Question, **_: object) -> None:
        raise StorageError("s3://bucket/index cannot be reached: check the network")

    monkeypatch.setattr(OpenIndex, "ask", away)
    refused = client.post("/search", json={"text": "a dog"})
    assert (refused.status_code, refused.json()["code"]) == (503, "index")
    assert refused.json()["error"] == "s3://bucket/index cannot be reached: check the network"
    assert refused.headers["retry-after"] == "10"


def test_what_no_one_expected_tells_nothing(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: OpenIndex, question: Question, **_: object) -> None:
        raise ZeroDivisionError("a secret of the inside")

    monkeypatch.setattr(OpenIndex, "ask", broken)
    refused = client.post("/search", json={"text": "a dog"})
    assert (refused.status_code, refused.json()["code"]) == (500, "internal")
    assert "secret" not in refused.text
    assert refused.headers["x-content-type-options"] == "nosniff"


def test_questions_beyond_the_queue_are_told_to_come_again(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, leave = threading.Semaphore(0), threading.Event()
    ask: Callable[..., Any] = OpenIndex.ask

    def slow(self: OpenIndex, question: Question, **options: object) -> Any:
        entered.release()
        leave.wait(20)
        return ask(self, question, **options)

    monkeypatch.setattr(OpenIndex, "ask", slow)
    statuses: list[int] = []
    with served.client(questions_at_once=1, questions_waiting=1) as client:  # one event loop for all

        def question() -> None:
            statuses.append(client.post("/search", json={"text": "a dog", "k": 1}).status_code)

        first, second = threading.Thread(target=question), threading.Thread(target=question)
        first.start()
        assert entered.acquire(timeout=20)
        second.start()
        while not waits(client):
            assert second.is_alive()
        busy = client.get("/similar/0/0?k=1")
        assert client.get("/healthz").status_code == 200
        assert client.get("/thumbnails/0").status_code == 200
        leave.set()
        first.join()
        second.join()
    assert (busy.status_code, busy.json()["code"], busy.headers["retry-after"]) == (503, "busy", "1")
    assert statuses == [200, 200]


def test_two_pictures_are_decoded_at_once_and_hold_up_no_words(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, leave = threading.Semaphore(0), threading.Event()
    ask: Callable[..., Any] = OpenIndex.ask

    def slow(self: OpenIndex, question: Question, **options: object) -> Any:
        if question.image is not None:
            entered.release()
            leave.wait(20)
        return ask(self, question, **options)

    monkeypatch.setattr(OpenIndex, "ask", slow)
    statuses: list[int] = []
    body = {"image": b64encode(picture()).decode(), "k": 1}
    bodies = [("/search", body), ("/search", body), ("/export", {"format": "csv", "question": body})]
    with served.client() as client:

        def question(path: str, body: dict[str, Any]) -> None:
            statuses.append(client.post(path, json=body).status_code)

        threads = [threading.Thread(target=question, args=each) for each in bodies]
        for thread in threads:
            thread.start()
        while not waits(client):
            assert all(thread.is_alive() for thread in threads)
        assert [entered.acquire(timeout=20) for _ in range(2)] == [True, True]
        assert not entered.acquire(blocking=False)
        assert client.post("/search", json={"text": "a dog", "k": 1}).status_code == 200
        leave.set()
        for thread in threads:
            thread.join()
    assert statuses == [200] * 3


def waits(client: TestClient) -> bool:
    """Whether the one place in the queue is taken, as the metrics tell."""
    return "for_ray_questions_waiting 1.0" in client.get("/metrics").text
