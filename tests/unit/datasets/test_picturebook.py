"""The data set that the package draws: the same bytes each time, true annotations, one line an error."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from for_ray.datasets import glyphs, pages, picturebook
from for_ray.datasets.glyphs import FIELD_PIXELS, GLYPH_PIXELS, Family, family_glyphs, field_of, object_name
from for_ray.datasets.pages import BASE, CATEGORIES, NOVEL, SceneObject, draw_page, other_names
from for_ray.datasets.picturebook import main, write_picturebook
from for_ray.datasets.scenes import COLOURS, Placement, SceneStyle, free_spot, place, shade
from for_ray.errors import ConfigError


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("picturebook") / "train"
    write_picturebook(out, images=40, split="train", seed=3, processes=1)
    return out


@pytest.fixture(scope="module")
def coco(drawn: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((drawn / "annotations.json").read_text())
    return content


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_processes_write_the_bytes_of_one(drawn: Path, tmp_path: Path) -> None:
    write_picturebook(tmp_path / "again", images=40, split="train", seed=3, processes=2)
    assert files(tmp_path / "again") == files(drawn)


def test_annotations_say_what_the_pages_show(drawn: Path, coco: dict[str, Any]) -> None:
    """Plain COCO, composed here anew from the pages; nothing that it was spooled through stays."""
    expected = []
    for index, image in enumerate(coco["images"][:12]):
        page = draw_page(3, "train", index)
        assert image == {
            "id": index + 1, "file_name": f"{index:06d}.jpg",
            "width": page.image.width, "height": page.image.height,
        }  # fmt: skip
        expected += [
            (index + 1, each.name, list(each.box), each.area)
            for each in page.objects
            if each.name in CATEGORIES and each.visible >= 0.3
        ]
    names = {category["id"]: category["name"] for category in coco["categories"]}
    found = [(a["image_id"], names[a["category_id"]], a["bbox"], a["area"]) for a in coco["annotations"]]
    assert found[: len(expected)] == expected
    assert len(coco["images"]) == 40
    assert coco["info"] == {"images": 40, "split": "train", "seed": 3}
    left = {path.name for path in drawn.iterdir()}
    assert left == {"annotations.json", "captions.jsonl", "images", "picturebook.json", "split.json"}


def test_a_set_without_annotations_is_still_coco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picturebook, "LEAST_VISIBLE", 2.0)
    path = write_picturebook(tmp_path / "set", images=2, split="val", processes=1)
    content = json.loads(path.read_text())
    assert (len(content["images"]), content["annotations"], len(content["categories"])) == (2, [], 65)


def test_pages_hold_three_to_nine_objects() -> None:
    counts = {len(draw_page(0, "val", index).objects) for index in range(60)}
    assert counts == {3, 4, 5, 6, 7, 8, 9}


def test_a_page_is_arranged_again_where_only_two_objects_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    count = len(pages._arrange(np.random.default_rng(1), 300, 300))
    answers = itertools.chain([True, True], [False] * 5 * (count - 2), itertools.repeat(True))  # 5 sizes each

    def spot(*_: object) -> tuple[float, float] | None:
        return (80.0, 80.0) if next(answers) else None

    assert count > 2
    monkeypatch.setattr(pages, "free_spot", spot)
    assert len(pages._arrange(np.random.default_rng(1), 300, 300)) == count


def test_an_object_without_room_is_tried_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []

    def no_room(_: object, boxes: np.ndarray, placement: Placement, *rest: object) -> None:
        assert boxes.shape == (0, 4)
        widths.append(placement.width)

    monkeypatch.setattr(pages, "free_spot", no_room)
    field = field_of(family_glyphs("material")["star"][0])
    assert pages._find_place(np.random.default_rng(0), field, [], (160, 160), 0.5) is None
    assert widths == sorted(widths, reverse=True)
    assert len(widths) == 5
    assert widths[-1] < 0.5 * widths[0]


def test_a_longer_set_begins_with_the_shorter(drawn: Path, tmp_path: Path) -> None:
    write_picturebook(tmp_path / "short", images=3, split="train", seed=3, processes=1)
    for name in ("images/000000.jpg", "images/000001.jpg", "images/000002.jpg"):
        assert (tmp_path / "short" / name).read_bytes() == (drawn / name).read_bytes()


def test_split_seed_and_index_each_change_the_image() -> None:
    pictures = [
        draw_page(*which).image.tobytes()
        for which in [(0, "train", 0), (0, "val", 0), (1, "train", 0), (0, "train", 1)]
    ]
    assert len(set(pictures)) == 4


def test_scenes_keep_to_their_sizes(drawn: Path, coco: dict[str, Any]) -> None:
    for record in coco["images"]:
        with Image.open(drawn / "images" / record["file_name"]) as image:
            assert image.format == "JPEG"
            assert image.size == (record["width"], record["height"])
            assert all(160 <= side <= 320 for side in image.size)


def test_boxes_lie_inside_their_images(coco: dict[str, Any]) -> None:
    sizes = {record["id"]: (record["width"], record["height"]) for record in coco["images"]}
    assert [record["id"] for record in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
    assert len(coco["annotations"]) > 2 * len(sizes)
    for record in coco["annotations"]:
        left, top, width, height = record["bbox"]
        assert left >= 0
        assert top >= 0
        assert left + width <= sizes[record["image_id"]][0]
        assert top + height <= sizes[record["image_id"]][1]
        assert 0 < record["area"] <= width * height
        assert record["iscrowd"] == 0
        assert record["visible"] >= 0.3


def test_categories_are_48_base_and_17_novel(drawn: Path, coco: dict[str, Any]) -> None:
    split = json.loads((drawn / "split.json").read_text())
    assert (len(split["base"]), len(split["novel"])) == (48, 17)
    assert sorted(split["base"] + split["novel"]) == [category["name"] for category in coco["categories"]]
    assert [category["id"] for category in coco["categories"]] == list(range(1, 66))
    assert {c["name"] for c in coco["categories"] if c["supercategory"] == "novel"} == set(NOVEL)


def test_other_families_draw_every_category() -> None:
    families: tuple[Family, ...] = ("awesome", "phosphor", "remix")
    others = set().union(*(family_glyphs(family) for family in families))
    assert set(CATEGORIES) <= others
    assert set(CATEGORIES) <= set(family_glyphs("material"))


def test_what_is_not_annotated_is_not_the_same_thing() -> None:
    assert not set(other_names()) & set(BASE + NOVEL)
    assert "bike" not in other_names()  # ImageNet's name for a bicycle, too
    assert len(other_names()) > 300


def test_an_annotated_box_holds_the_object() -> None:
    page = draw_page(0, "val", 12)
    width, height = page.image.size
    for each in page.objects:
        _, _, wide, tall = each.box
        assert 0 <= each.visible <= 1
        assert each.area <= wide * tall <= width * height


def test_a_covered_object_counts_what_is_seen() -> None:
    mask = np.zeros((10, 12), bool)
    mask[2:5, 3:7] = True
    assert pages._as_seen(mask, "dog", "red", 48.0) == SceneObject("dog", "red", (3, 2, 4, 3), 12, 0.25)
    assert pages._as_seen(np.zeros((10, 12), bool), "dog", "red", 48.0).visible == 0


def test_captions_name_what_can_be_seen(drawn: Path) -> None:
    lines = [json.loads(line) for line in (drawn / "captions.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == [f"{index:06d}.jpg" for index in range(40)]
    for index in range(10):
        page = draw_page(3, "train", index)
        assert lines[index]["captions"] == list(page.captions)
        visible = [each.name for each in page.objects if each.visible >= 0.3]
        assert any(
            name in page.captions[0] or pages._phrase(2, "", name)[4:] in page.captions[0] for name in visible
        )


@pytest.mark.parametrize(
    ("count", "colour", "name", "phrase"),
    [
        (1, "red", "car", "a red car"),
        (1, "orange", "cat", "an orange cat"),
        (2, "", "dog", "two dogs"),
        (3, "blue", "bus", "three blue buses"),
        (2, "", "knife", "two knives"),
        (9, "", "fish", "many fish"),
    ],
)
def test_phrases_are_english(count: int, colour: str, name: str, phrase: str) -> None:
    assert pages._phrase(count, colour, name) == phrase


def test_a_scene_without_visible_objects_has_a_caption() -> None:
    assert pages._caption(np.random.default_rng(0), (), "at night") == "nothing much at night"


@pytest.mark.parametrize(
    ("glyph", "name"),
    [
        ("car", "car"),
        ("car-outline", "car"),
        ("car-battery-thin", "car battery"),
        ("tree-2-line", "tree"),
        ("dog-side", "dog"),
        ("line", "line"),
        ("2", "2"),
    ],
)
def test_style_is_no_part_of_a_name(glyph: str, name: str) -> None:
    assert object_name(glyph) == name


def test_what_is_no_object_is_left_out() -> None:
    for family in glyphs.FONT_FILES:
        assert not {"menu", "cursor", "circle", "a"} & set(family_glyphs(family))
    assert len(set().union(*(family_glyphs(family) for family in glyphs.FONT_FILES))) > 500


def test_a_field_measures_distances_to_the_outline() -> None:
    """The middle of a filled star lies deep inside, a corner of the field far outside."""
    field = field_of(family_glyphs("material")["star"][0])
    edge, body = np.asarray(field.edge, int), np.asarray(field.body, int)
    assert edge.shape == (FIELD_PIXELS, FIELD_PIXELS)
    assert GLYPH_PIXELS / 2 < max(field.extent) <= GLYPH_PIXELS + 2
    assert edge[64, 64] > 200
    assert edge[0, 0] == 0
    assert (body >= edge).all()


def test_a_body_has_no_holes() -> None:
    field = field_of(family_glyphs("material")["calculator"][0])
    edge, body = np.asarray(field.edge, int), np.asarray(field.body, int)
    rows, columns = np.nonzero(body >= 128)
    holes = (edge < 128)[rows.min() : rows.max(), columns.min() : columns.max()].sum()
    assert holes > 200
    assert (body[70:90, 50:80] >= 128).all()


@pytest.mark.parametrize("name", list(COLOURS))
def test_shades_look_like_their_name(name: str) -> None:
    """A shade's nearest named colour, by hue or lightness, is its own most of the time."""
    rng = np.random.default_rng(0)
    middles = {other: np.array(pages._typical(other), float) for other in COLOURS}
    shades = [np.array(shade(rng, name), float) for _ in range(50)]
    nearest = [min(middles, key=lambda other: float(np.abs(middles[other] - each).sum())) for each in shades]
    assert nearest.count(name) >= 35


def test_objects_keep_their_distance() -> None:
    rng = np.random.default_rng(0)
    style = SceneStyle((0.2, 0.2), 0, 0, 0, (0, 0), 0)
    placement = place(rng, field_of(family_glyphs("material")["car"][0]), 200, style)
    assert free_spot(rng, np.array([[0.0, 0.0, 200.0, 200.0]]), placement, (200, 200), 0.0) is None
    spot = free_spot(rng, np.zeros((0, 4)), placement, (200, 200), 0.0)
    assert spot is not None
    assert all(0 < coordinate < 200 for coordinate in spot)


def test_an_equal_set_stays_as_it_is(drawn: Path) -> None:
    before = (drawn / "annotations.json").stat().st_mtime_ns
    write_picturebook(drawn, images=40, split="train", seed=3)
    assert (drawn / "annotations.json").stat().st_mtime_ns == before


def test_an_interrupted_set_is_drawn_again(tmp_path: Path) -> None:
    write_picturebook(tmp_path / "set", images=2, split="val", processes=1)
    before = files(tmp_path / "set")
    (tmp_path / "set" / "annotations.json").unlink()
    (tmp_path / "set" / "images" / "000001.jpg").write_bytes(b"half")
    write_picturebook(tmp_path / "set", images=2, split="val", processes=1)
    assert files(tmp_path / "set") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "0"], "at least 1"),
        (["--images", "2", "--processes", "0"], "at least 1"),
        (["--images", "2", "--seed", "-1"], "at least 1 and --seed 0"),
    ],
)
def test_bad_settings_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["--out", str(tmp_path / "new"), "--split", "val", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_another_set_is_not_overwritten(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(drawn), "--split", "val", "--images", "40"]) == 2
    assert "give a new folder or remove this one" in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["--out", str(tmp_path), "--split", "val", "--images", "1"]) == 2
    assert "holds no picture book" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_place_that_cannot_be_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file" / "set"), "--split", "val", "--images", "1"]) == 2
    error = capsys.readouterr().err
    assert "cannot write the picture book" in error
    assert error.count("\n") == 1


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(ConfigError, match=r"pip install 'for_ray\[demo\]'"):
        glyphs.font_folder()
