"""Planted vectors are found, by their uris, through the real encoder, table, segments and snapshots."""

import io
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from for_ray import retrieval
from for_ray.errors import ConfigError, DataError, ForRayError
from for_ray.evaluation.exact import exact_top_images
from for_ray.index import table
from for_ray.model.bundle import Bundle
from for_ray.retrieval import Hit, open_index, rows
from for_ray.sheet import Tile
from tests.planted import Planted, PlantedIndex, at_cosines

DIM = 16


def unit(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32)


def random_units(count: int, seed: int) -> NDArray[np.float32]:
    return unit(np.random.default_rng(seed).normal(size=(count, DIM)))


def jpeg(colour: str = "red", size: tuple[int, int] = (80, 60)) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", size, colour).save(written, "JPEG")
    return written.getvalue()


def uris(hits: list[Hit]) -> list[str]:
    return [hit.uri for hit in hits]


@pytest.fixture(scope="module")
def text_query(tiny_bundle: Bundle) -> NDArray[np.float32]:
    from for_ray.model.encoder import load_encoder

    return load_encoder(tiny_bundle, device="cpu").embed_text(["a red car"])[0]


QUERY = unit(np.arange(1.0, DIM + 1))


def test_text_finds_the_planted_images_in_order(
    planted_index: PlantedIndex, text_query: NDArray[np.float32]
) -> None:
    images = [
        Planted("far.jpg", at_cosines(text_query, -0.5, 0.1)),
        Planted(
            "second.jpg",
            at_cosines(text_query, 0.2, 0.7, 0.3),
            [(0, 0, 1, 1), (0.2, 0.4, 0.6, 0.8), (0, 0, 0.2, 1)],
        ),
        Planted("bad.jpg", np.empty((0, DIM)), error="truncated"),
        Planted("first.jpg", at_cosines(text_query, 0.9), [(0.2, 0.2, 0.4, 1.0)]),
        Planted("third.jpg", at_cosines(text_query, 0.5, -0.9)),
    ]
    planted_index.add(images)
    planted_index.publish(nprobe=2)
    hits = open_index(planted_index.uri).search("  a red\tcar ", k=4)
    assert uris(hits) == ["first.jpg", "second.jpg", "third.jpg", "far.jpg"]
    assert [hit.score for hit in hits] == pytest.approx([0.9, 0.7, 0.5, 0.1], abs=2e-3)
    assert [hit.image_id for hit in hits] == [3, 1, 4, 0]
    assert [hit.slot for hit in hits] == [0, 1, 0, 1]
    assert hits[1].box == pytest.approx((0.2, 0.4, 0.6, 0.8), abs=1e-6)
    box = [0.2, 0.4, 0.6, 0.8]
    found = {"name": "a red car", "score": hits[1].score, "slot": 1, "box": box}
    assert hits[1].to_json() == {
        "uri": "second.jpg", "score": hits[1].score, "image_id": 1, "slot": 1, "box": box,
        "found": [found], "folded": [],
    }  # fmt: skip


def test_picture_finds_its_like(planted_index: PlantedIndex, tiny_bundle: Bundle) -> None:
    from for_ray.model.encoder import load_encoder

    like = load_encoder(tiny_bundle, device="cpu").embed_image(jpeg())
    planted_index.add(
        [
            Planted(f"{cosine}", np.concatenate([at_cosines(vector, cosine) for vector in like]))
            for cosine in (0.1, 0.95, 0.4)
        ]
    )
    planted_index.publish(nprobe=2)
    hits = open_index(planted_index.uri).search(image=jpeg(), k=2)
    assert uris(hits) == ["0.95", "0.4"]
    assert hits[0].score == pytest.approx(0.95, abs=5e-3)


@pytest.mark.parametrize("codec", ["IVF3,Flat", "IVF3,SQ4", "RR16,IVF3,RaBitQ4"])
def test_answers_are_those_of_exact_search(planted_index: PlantedIndex, codec: str) -> None:
    """Whatever the codec's own scores are: three segments, deletes in between, quarantined images."""
    rng = np.random.default_rng(5)
    counts = rng.integers(0, 6, 90)
    images = [Planted(f"{row}", random_units(count, row)) for row, count in enumerate(counts)]
    planted_index.add(images[:30], codec=codec)
    planted_index.add(images[30:60], deleted=[0, 31, 29])
    planted_index.add(images[60:], deleted=[59, 89])
    deleted = [0, 29, 31, 59, 89]
    planted_index.publish(deleted=deleted, nprobe=3)
    index = open_index(planted_index.uri)
    images_table = table.open_table(planted_index.images_uri)
    stored = list(table.read_vectors(images_table, 0, 90, batch_rows=1000))
    for query in random_units(5, seed=1000):
        ids, scores = exact_top_images(stored, query[None], 20)
        hits = index.search_vector(query, k=20)
        assert [hit.image_id for hit in hits] == ids[0].tolist()
        assert [hit.score for hit in hits] == scores[0].tolist()
        assert uris(hits) == [str(image_id) for image_id in ids[0]]
        assert not set(deleted) & {hit.image_id for hit in hits}
        everything = index.search_vector(query, k=1000)
        assert {hit.image_id for hit in everything} == set(np.flatnonzero(counts)) - set(deleted)


def test_slot_and_box_are_those_of_the_best_vector(planted_index: PlantedIndex) -> None:
    boxes = [(number / 5, 0.0, number / 5 + 0.2, 0.2) for number in range(5)]
    planted_index.add(
        [
            Planted(f"{best}", at_cosines(QUERY, *np.roll([0.9, 0.1, 0.2, 0.3, 0.4], best)), boxes)
            for best in range(5)
        ]
    )
    planted_index.publish(nprobe=2)
    for hit in open_index(planted_index.uri).search_vector(QUERY, k=5):
        assert hit.slot == int(hit.uri)
        assert hit.box == pytest.approx(boxes[hit.slot], abs=1e-6)


def test_equal_scores_are_ordered_by_image_id(planted_index: PlantedIndex) -> None:
    same = at_cosines(QUERY, 0.6)
    planted_index.add([Planted(f"{number}", same) for number in range(30)])
    planted_index.add([Planted("best", at_cosines(QUERY, 0.8)), Planted("same", same)], deleted=[4])
    planted_index.publish(deleted=[4], nprobe=2)
    index = open_index(planted_index.uri)
    assert uris(index.search_vector(QUERY, k=7)) == ["best", "0", "1", "2", "3", "5", "6"]
    assert index.search_vector(QUERY, k=31) == open_index(planted_index.uri).search_vector(QUERY, k=31)


def test_an_open_index_stays_with_its_snapshot(planted_index: PlantedIndex) -> None:
    planted_index.add(
        [
            Planted("old", at_cosines(QUERY, 0.8)),
            Planted("stays", at_cosines(QUERY, 0.5)),
            Planted("x", -QUERY[None]),
        ]
    )
    first = planted_index.publish(nprobe=2)
    before = open_index(planted_index.uri)
    planted_index.add([Planted("new", at_cosines(QUERY, 0.9))], deleted=[0])
    second = planted_index.publish(deleted=[0], nprobe=2)
    assert uris(before.search_vector(QUERY, k=2)) == ["old", "stays"]
    assert uris(open_index(planted_index.uri).search_vector(QUERY, k=2)) == ["new", "stays"]
    rolled_back = open_index(planted_index.uri, snapshot_id=first.snapshot_id)
    assert uris(rolled_back.search_vector(QUERY, k=2)) == ["old", "stays"]
    assert open_index(planted_index.uri).snapshot == second


def test_deleted_images_are_left_out_even_if_the_table_still_has_them(planted_index: PlantedIndex) -> None:
    planted_index.add([Planted(f"{number}", at_cosines(QUERY, 0.9 - number / 10)) for number in range(8)])
    planted_index.publish(deleted=[0, 2, 3], nprobe=2)
    assert uris(open_index(planted_index.uri).search_vector(QUERY, k=3)) == ["1", "4", "5"]


def test_index_without_images_gives_nothing(planted_index: PlantedIndex) -> None:
    planted_index.segment_path("none").parent.mkdir(parents=True)
    from for_ray.schema import images_schema

    table.create_table(planted_index.images_uri, images_schema(DIM))
    planted_index.publish(nprobe=0)
    assert open_index(planted_index.uri).search("a dog") == []


def test_encoder_is_loaded_once_and_only_when_asked(
    planted_index: PlantedIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    from for_ray.model import encoder

    planted_index.add([Planted("a", at_cosines(QUERY, 0.9, 0.1, 0.2))])
    planted_index.publish(nprobe=2)
    loaded: list[Bundle] = []
    load = encoder.load_encoder
    monkeypatch.setattr(
        encoder, "load_encoder", lambda bundle, device: loaded.append(bundle) or load(bundle, device)
    )
    index = open_index(planted_index.uri)
    index.search_vector(QUERY)
    assert loaded == []
    askers = [threading.Thread(target=index.search, args=("a dog",)) for _ in range(4)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert len(loaded) == 1


@pytest.fixture
def published(planted_index: PlantedIndex) -> PlantedIndex:
    planted_index.add([Planted("a", at_cosines(QUERY, 0.9, 0.1)), Planted("b", at_cosines(QUERY, 0.3))])
    planted_index.publish(nprobe=2)
    return planted_index


def refusal(kind: type[ForRayError], call: Callable[[], object], *words: str) -> None:
    """The call is refused, in one line with these words."""
    with pytest.raises(kind) as refused:
        call()
    message = str(refused.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ({}, ["words, a picture"]),
        ({"text": "a dog", "image": jpeg()}, ["words, a picture"]),
        ({"text": ""}, ["empty"]),
        ({"text": " \n"}, ["empty"]),
        ({"text": 10_000 * "x"}, ["10,000 letters", "1,000"]),
        ({"text": "a dog", "k": 0}, ["1 to 10,000", "got 0"]),
        ({"text": "a dog", "k": 10_000_000}, ["1 to 10,000", "got 10,000,000"]),
    ],
)
def test_wrong_questions(published: PlantedIndex, question: dict[str, Any], words: list[str]) -> None:
    index = open_index(published.uri)
    refusal(ConfigError, lambda: index.search(**question), *words)


@pytest.mark.parametrize(
    ("vector", "words"),
    [
        (100 * QUERY, ["unit vector of 16 numbers", "length 100", "divide"]),
        (0 * QUERY, ["length 0"]),
        (QUERY * np.float32("nan"), ["length nan"]),
        (QUERY[:-1], ["unit vector of 16 numbers", "shape [15]"]),
        (QUERY[None], ["shape [1, 16]"]),
    ],
    ids=["long", "zero", "nan", "dimension", "two axes"],
)
def test_vectors_that_are_none(
    published: PlantedIndex, vector: NDArray[np.float32], words: list[str]
) -> None:
    index = open_index(published.uri)
    refusal(ConfigError, lambda: index.search_vector(vector), *words)
    assert uris(index.search_vector(QUERY.astype(np.float16), k=1)) == ["a"]


@pytest.mark.parametrize("content", [b"", b"no image", jpeg()[:100]], ids=["empty", "text", "cut"])
def test_picture_that_cannot_be_decoded(published: PlantedIndex, content: bytes) -> None:
    index = open_index(published.uri)
    refusal(
        DataError, lambda: index.search(image=content), "the picture to look for can't be decoded: ", "give"
    )


def test_no_index_and_no_snapshot(published: PlantedIndex, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    refusal(DataError, lambda: open_index(nowhere), nowhere, "no published snapshot", "jobs/index.py")
    refusal(DataError, lambda: open_index(published.uri, snapshot_id=7), published.uri, "snapshot 7")


def test_missing_segment(published: PlantedIndex) -> None:
    path = published.segment_path("segment-0.faiss")
    path.unlink()
    refusal(DataError, lambda: open_index(published.uri), str(path), "not there")


def test_damaged_segment(published: PlantedIndex) -> None:
    path = published.segment_path("segment-0.faiss")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refusal(DataError, lambda: open_index(published.uri), str(path), "SHA-256")


def test_missing_bundle(published: PlantedIndex) -> None:
    uri = published.layout.bundle_uri(published.bundle.fingerprint)
    shutil.rmtree(uri)
    refusal(ForRayError, lambda: open_index(published.uri), uri)


def test_replaced_bundle(published: PlantedIndex) -> None:
    path = Path(published.layout.bundle_uri(published.bundle.fingerprint)) / "encoder.toml"
    path.write_text(path.read_text().replace('head = "cluster"', 'head = "dense"'))
    refusal(DataError, lambda: open_index(published.uri), str(path.parent), published.bundle.fingerprint)


def test_missing_table_of_images(published: PlantedIndex) -> None:
    shutil.rmtree(published.images_uri)
    refusal(DataError, lambda: open_index(published.uri), published.images_uri, "not there")


def test_version_of_the_table_that_is_gone(published: PlantedIndex) -> None:
    for version in (Path(published.images_uri) / "_versions").iterdir():
        version.rename(version.with_suffix(".gone"))
    refusal(ForRayError, lambda: open_index(published.uri), published.images_uri)


def test_table_whose_files_are_gone(published: PlantedIndex) -> None:
    index = open_index(published.uri)
    shutil.rmtree(Path(published.images_uri) / "data")
    refusal(ForRayError, lambda: index.search_vector(QUERY), published.images_uri)


def test_index_of_another_encoder(published: PlantedIndex, tmp_path: Path) -> None:
    own = published.layout.bundle_uri(published.bundle.fingerprint)
    assert uris(open_index(published.uri, encoder=own).search_vector(QUERY, k=1)) == ["a"]
    other = tmp_path / "other"
    shutil.copytree(own, other)
    config = other / "encoder.toml"
    config.write_text(config.read_text().replace("num_slots = 4", "num_slots = 3"))
    refusal(
        ConfigError,
        lambda: open_index(published.uri, encoder=str(other)),
        published.uri, str(other), published.bundle.fingerprint,
    )  # fmt: skip
    refusal(ConfigError, lambda: open_index(published.uri, encoder="picturebok"), "picturebok")


def test_sheet_goes_on_without_images_that_are_gone_or_changed(
    planted_index: PlantedIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from for_ray import storage
    from for_ray.retrieval import sheets

    paths = [tmp_path / name for name in ("good.jpg", "gone.jpg", "changed.jpg", "broken.jpg")]
    for path in paths:
        path.write_bytes(jpeg())
    etags = [storage.stat(str(path)).etag for path in paths]
    vectors = [at_cosines(QUERY, cosine) for cosine in (0.9, 0.8, 0.7, 0.6)]
    planted_index.add(
        [
            Planted(str(path), vector, etag=etag)
            for path, vector, etag in zip(paths, vectors, etags, strict=True)
        ]
        + [Planted("ftp://strange", at_cosines(QUERY, 0.5), etag=None)]
    )
    planted_index.publish(nprobe=2)
    paths[1].unlink()
    paths[2].write_bytes(jpeg("blue", (100, 100)))
    drawn: list[list[Tile]] = []
    draw = sheets.draw_sheet
    monkeypatch.setattr(
        sheets, "draw_sheet", lambda tiles, **names: drawn.append(tiles) or draw(tiles, **names)
    )
    index = open_index(planted_index.uri)
    hits = index.search_vector(QUERY, k=10)
    sheet = tmp_path / "new" / "sheet.jpg"
    index.write_sheet(sheet, hits, title="a red car")
    [tiles] = drawn
    assert [tile.caption for tile in tiles] == [
        "good.jpg",
        "gone.jpg",
        "changed.jpg",
        "broken.jpg",
        "strange",
    ]
    assert [tile.score for tile in tiles] == [hit.score for hit in hits]
    assert (tiles[0].image, tiles[0].box) == (jpeg(), hits[0].box)
    assert [tile.problem for tile in tiles[1:3]] == [
        "gone since the index was built",
        "changed since the index was built",
    ]
    assert tiles[3].image == jpeg()
    assert tiles[4].image is None
    assert "ftp://strange" in tiles[4].problem
    with Image.open(sheet) as image:
        assert image.format == "JPEG"


def test_sheet_path_is_checked(tmp_path: Path) -> None:
    retrieval.check_sheet(tmp_path / "new" / "a.JPG")
    assert not (tmp_path / "new").exists()
    refusal(ConfigError, lambda: retrieval.check_sheet(tmp_path / "a.png"), "a.png", ".jpg")
    (tmp_path / "b.jpg").mkdir()
    refusal(ConfigError, lambda: retrieval.check_sheet(tmp_path / "b.jpg"), "b.jpg")
    (tmp_path / "file").touch()
    refusal(ForRayError, lambda: retrieval.check_sheet(tmp_path / "file" / "c.jpg"), str(tmp_path / "file"))


def test_example_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg())
    assert retrieval.read_example(str(path)) == jpeg()
    refusal(ConfigError, lambda: retrieval.read_example(str(tmp_path / "b.jpg")), "b.jpg")
    refusal(ForRayError, lambda: retrieval.read_example(str(tmp_path)), str(tmp_path))


def test_table_is_asked_once_where_an_image_lies(
    published: PlantedIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[NDArray[np.int64]] = []
    take_rows = rows.take_rows

    def counting(images: Any, image_ids: NDArray[np.int64], columns: list[str]) -> Any:
        asked.append(image_ids)
        return take_rows(images, image_ids, columns)

    monkeypatch.setattr(rows, "take_rows", counting)
    index = open_index(published.uri)
    first = index.image(0)
    assert first is not None
    assert (first.image_id, index.image(0), index.image(99)) == (0, first, None)
    assert len(asked) == 2
