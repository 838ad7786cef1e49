"""From a data set and its table of pseudo-labels to the images of a training, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from for_ray.datasets.labelled import LabelledImages
from for_ray.datasets.spec import open_dataset
from for_ray.errors import DataError
from for_ray.stages.training_data import LabelTable, digest, find_images, open_labels, part_images
from for_ray.stages.training_images import read_ahead
from tests.planted_labels import BASE, draw_dataset, write_labels

NUM_IMAGES = 24
BROKEN = ("0003.png",)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw_dataset(folder / "data", NUM_IMAGES)
    write_labels(folder / "labels", folder / "data" / "images", broken=BROKEN)
    write_labels(folder / "plain", folder / "data" / "images", with_features=False)
    return folder


@pytest.fixture(scope="module")
def dataset(home: Path) -> LabelledImages:
    data = home / "data"
    return open_dataset(f"coco:{data}/annotations.json:{data}/images", split=str(data / "split.json"))


@pytest.fixture(scope="module")
def labels(home: Path) -> LabelTable:
    return open_labels(str(home / "labels"))


def test_images_are_found_in_the_table_with_their_base_labels(dataset, labels):
    found = find_images(dataset, labels, num_categories=len(BASE))
    assert found.num_missing == 1
    assert found.names == [f"{number:04d}.png" for number in range(NUM_IMAGES) if number != 3]
    assert found.images.has_features
    rows = labels.table.to_table(columns=["uri"], with_row_id=True).to_pydict()
    uris = dict(zip(rows["_rowid"], rows["uri"], strict=True))
    for place, name in enumerate(found.names):
        assert uris[found.images.row_ids[place]].endswith(name)
        expected = dataset.labels.row(int(name[:4]))
        assert found.images.labels.row(place).tolist() == expected[expected < len(BASE)].tolist()


def test_without_features_the_images_are_read(dataset, home):
    found = find_images(dataset, open_labels(str(home / "plain")), num_categories=len(BASE))
    assert not found.images.has_features
    assert found.images.uris.to_pylist() == dataset.uris.to_pylist()
    assert all(found.images.etags.to_pylist())
    alone = find_images(dataset, None, num_categories=len(BASE)).images
    assert (alone.uris.to_pylist(), alone.etags, alone.row_ids) == (dataset.uris.to_pylist(), None, None)


def test_too_many_images_without_a_row_are_refused(dataset, labels, home, tmp_path):
    with pytest.raises(DataError, match=r"1 of the 24 images of coco annotations are not in the table .*2%"):
        find_images(dataset, labels, num_categories=4, max_bad_fraction=0.02)
    draw_dataset(tmp_path / "other", 5)
    other = tmp_path / "other"
    elsewhere = open_dataset(f"coco:{other}/annotations.json:{other}/images", split=str(other / "split.json"))
    with pytest.raises(DataError, match=r"5 of the 5 images .* Is it the table of this data set\?"):
        find_images(elsewhere, labels, num_categories=4, max_bad_fraction=1.0)


def test_labels_beyond_the_labelled_fraction_are_gone(dataset, labels):
    found = find_images(dataset, labels, num_categories=len(BASE))
    parts = part_images(found, labels, held_out=0.25, labelled_fraction=0.5, fold=2)
    assert (len(parts.train), len(parts.held_out)) == (17, 6)
    for images in (parts.train, parts.held_out):
        for row in range(len(images)):
            assert images.is_labelled[row] or not len(images.labels.row(row))
    num_known = parts.train.is_labelled.sum() + parts.held_out.is_labelled.sum()
    assert num_known == round(0.5 * 23)
    whole = part_images(found, labels, held_out=0.25, labelled_fraction=1.0, fold=0)
    assert (whole.train.row_ids == parts.train.row_ids).all()  # what is held out hangs on no fold
    assert whole.train.is_labelled.all()
    assert part_images(found, labels, held_out=0.0, labelled_fraction=1.0, fold=0).held_out is None


def test_without_pseudo_labels_only_labelled_images_are_trained_on(dataset, labels):
    found = find_images(dataset, labels, num_categories=len(BASE))
    settings = {"held_out": 0.25, "labelled_fraction": 0.5, "fold": 2}
    parts, fewer = (part_images(found, labels, **settings, labelled_only=only) for only in (False, True))
    assert fewer.train.row_ids.tolist() == parts.train.row_ids[parts.train.is_labelled].tolist()
    assert len(fewer.held_out) == len(parts.held_out)


def test_held_out_images_bring_their_pseudo_labels(dataset, labels):
    found = find_images(dataset, labels, num_categories=len(BASE))
    parts = part_images(found, labels, held_out=0.25, labelled_fraction=1.0, fold=0)
    rows = labels.table.to_table(columns=["labels"], with_row_id=True).to_pydict()
    expected = dict(zip(rows["_rowid"], rows["labels"], strict=True))
    for place, row_id in enumerate(parts.held_out.row_ids):
        assert parts.held_out_pseudo.row(place).tolist() == expected[row_id]


def test_the_digest_tells_what_is_trained_on(dataset, labels):
    found = find_images(dataset, labels, num_categories=len(BASE))

    def told(**changes) -> str:
        settings = {"held_out": 0.25, "labelled_fraction": 1.0, "fold": 0} | changes
        return digest(part_images(found, labels, **settings)[:2])

    assert told() == told()
    others = [told(held_out=0.1), told(labelled_fraction=0.5), told(labelled_fraction=0.5, fold=1)]
    assert len({told(), *others}) == 4
    assert digest([found.images]) != digest([None, found.images])


def test_labels_that_are_not_there_or_not_whole_are_refused(home, tmp_path):
    with pytest.raises(DataError, match=r"no pseudo-labels at .*nowhere: run jobs/pseudo_label.py --output"):
        open_labels(str(tmp_path / "nowhere"))
    draw_dataset(tmp_path / "data", 2)
    place = Path(write_labels(tmp_path / "labels", tmp_path / "data" / "images"))
    record = (place / "labels.json").read_text()
    (place / "labels.json").write_text("{}")
    with pytest.raises(DataError, match=r"labels.json is no record of labels"):
        open_labels(str(place))
    (place / "labels.json").write_text(record.replace('"format":1', '"format":99'))
    with pytest.raises(DataError, match="is of format 99, expected 1"):
        open_labels(str(place))
    (place / "labels.json").write_text(record)
    (place / "report.html").unlink()
    with pytest.raises(DataError, match=r"are not complete: run jobs/pseudo_label.py again"):
        open_labels(str(place))


def test_reading_ahead_keeps_the_order_and_raises_where_it_stands():
    assert list(read_ahead(lambda number: number * 2, range(7), 3)) == [0, 2, 4, 6, 8, 10, 12]
    assert list(read_ahead(str, [], 3)) == []

    def read(number: int) -> int:
        if number == 4:
            raise DataError("broken")
        return number

    coming = read_ahead(read, range(9), 2)
    assert [next(coming) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(DataError, match="broken"):
        next(coming)


def test_reading_ahead_reads_no_further_than_it_should():
    begun: list[int] = []

    def read(number: int) -> int:
        begun.append(number)
        return number

    coming = read_ahead(read, range(100), 2)
    assert [next(coming), next(coming)] == [0, 1]
    coming.close()
    assert len(begun) <= 4
    assert np.array_equal(sorted(begun), range(len(begun)))
