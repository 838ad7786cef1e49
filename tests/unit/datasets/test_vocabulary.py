"""ImageNet-21K's names, and names from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from for_ray.datasets.vocabulary import (
    imagenet21k_lemmas,
    imagenet21k_names,
    meanings,
    read_names,
    read_vocabulary,
)
from for_ray.errors import ConfigError


def test_every_imagenet21k_class_has_its_lemmas() -> None:
    lemmas = imagenet21k_lemmas()
    assert len(lemmas) == 21_843
    assert lemmas[4] == ("person", "individual", "someone", "somebody", "mortal", "soul")
    assert all(each and all(lemma == lemma.strip() != "" for lemma in each) for each in lemmas)


def test_names_are_the_first_lemmas() -> None:
    names = imagenet21k_names()
    assert len(names) == 21_843
    assert names[:2] == ["organism", "benthos"]


def test_names_are_read_in_order_without_repetition(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("\ufeffdog\n\n  fire extinguisher \r\ndog\nÆrø ferry", encoding="utf-8")
    assert read_names(path) == ["dog", "fire extinguisher", "Ærø ferry"]


@pytest.mark.parametrize("content", [b"", b" \n\n", b"caf\xe9\n"])
def test_a_file_without_names_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="one name a line") as caught:
        read_names(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the names"):
        read_names(tmp_path / "absent.txt")


def test_a_vocabulary_has_each_name_once(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("dog\nred kite\ndog\n", encoding="utf-8")
    assert read_vocabulary(str(path)).names == ("dog", "red kite")
    names = read_vocabulary("imagenet21k").names
    assert len(names) == len(set(names)) == len(set(imagenet21k_names()))
    assert names[:2] == ("organism", "benthos")


def test_names_that_mean_an_excluded_category_are_dropped_and_told(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("Sofa\ncouch\nfire extinguisher\nCOUCH\ncouch potato\nlamp\n", encoding="utf-8")
    found = read_vocabulary(str(path), excluded=["couch", "Fire_Extinguisher", "unheard of"])
    assert found.names == ("couch potato", "lamp")
    assert found.dropped == ("Sofa", "couch", "fire extinguisher", "COUCH")
    assert read_vocabulary(str(path), excluded=["unheard of"]).dropped == ()


def test_a_vocabulary_of_excluded_names_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("sofa\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"all names of the vocabulary .*names.txt mean novel categories"):
        read_vocabulary(str(path), excluded=["couch"])


def test_a_name_means_what_it_equals_and_what_shares_a_class_with_it() -> None:
    names = ["sofa", "couch", "TV", "mouse (animal)", "zzz"]
    categories = ["couch", "tv", "mouse", "zebra"]
    assert [meanings(names, categories).row(index).tolist() for index in range(5)] == [[0], [0], [1], [2], []]
    # "couch" is there as itself: "sofa" need not stand for it
    sparing = meanings(names, categories, only_missing=True)
    assert [sparing.row(index).tolist() for index in range(5)] == [[], [0], [1], [2], []]
    without = meanings(["sofa"], categories, only_missing=True)
    assert without.row(0).tolist() == [0]


def test_no_names_and_no_categories_mean_nothing() -> None:
    assert len(meanings([], ["dog"])) == 0
    assert meanings(["dog"], []).row(0).tolist() == []
