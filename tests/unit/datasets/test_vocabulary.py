"""ImageNet-21K's names, and names from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from for_ray.datasets.vocabulary import imagenet21k_lemmas, imagenet21k_names, read_names
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
