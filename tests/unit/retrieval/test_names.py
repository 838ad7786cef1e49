"""Vectors of names: each is embedded once, by itself, and the last used ones are kept."""

import io
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from for_ray.errors import ConfigError
from for_ray.model.bundle import Bundle
from for_ray.model.encoder import Encoder, load_encoder
from for_ray.retrieval.names import Kept, NameVectors
from for_ray.retrieval.queries import PictureError, picture_query


class Tower:
    """Stands for a text tower; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def reads_whole(self, name: str) -> bool:
        return True

    def embed_text(self, names: Sequence[str]) -> NDArray[np.float32]:
        self.asked.append(list(names))
        return np.array([[len(name), 1.0] for name in names], np.float32)


def vectors_of(tower: Tower, kept: int) -> NameVectors:
    return NameVectors(tower, kept=kept)  # type: ignore[arg-type]


def test_each_name_is_embedded_once() -> None:
    tower = Tower()
    vectors = vectors_of(tower, 10)
    assert vectors.embed(["abc", "a", "abc"]).tolist() == [[3, 1], [1, 1], [3, 1]]
    assert vectors.embed(["a", "ab"]).tolist() == [[1, 1], [2, 1]]
    assert tower.asked == [["abc"], ["a"], ["ab"]]


def test_the_last_used_names_are_kept() -> None:
    tower = Tower()
    vectors = vectors_of(tower, 2)
    vectors.embed(["a", "b"])
    vectors.embed(["a"])
    vectors.embed(["c"])  # in the place of "b"
    vectors.embed(["a", "c"])
    assert len(tower.asked) == 3
    vectors.embed(["b"])
    assert len(tower.asked) == 4
    assert len(vectors) == 2


def test_pictures_are_encoded_once_each_way(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def picture(color: str) -> bytes:
        written = io.BytesIO()
        Image.new("RGB", (80, 60), color).save(written, "PNG")
        return written.getvalue()

    encoded: list[int] = []
    features = Encoder.features
    monkeypatch.setattr(Encoder, "features", lambda self, given: encoded.append(1) or features(self, given))
    texts, red = NameVectors(encoder), picture("red")
    regions = [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)]
    first = [picture_query(red, region, texts).terms for region in (None, *regions)]
    assert len(encoded) == 2  # whole, and by its objects
    again = [picture_query(red, region, texts).terms for region in (None, *regions)]
    assert len(encoded) == 2
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(first[0], encoder.embed_image(red), atol=1e-6)
    assert picture_query(picture("blue"), None, texts).terms.shape == first[0].shape
    assert len(encoded) == 4  # one more picture, and once for the reference
    for _ in range(3):
        with pytest.raises(PictureError):
            picture_query(b"no picture", None, texts)
    assert len(texts.pictures) == 3


@pytest.fixture(scope="module")
def encoder(tiny_bundle: Bundle) -> Encoder:
    return load_encoder(tiny_bundle, device="cpu")


def test_vectors_are_the_text_towers(encoder: Encoder) -> None:
    names = ["a dog", "a cat", "a very long name of a thing"]
    found = NameVectors(encoder).embed(names)
    np.testing.assert_allclose(found, encoder.embed_text(names), atol=1e-6)
    # To the last bit the same, whatever a name is asked with.
    np.testing.assert_array_equal(NameVectors(encoder).embed(names[::-1])[::-1], found)
    np.testing.assert_array_equal(NameVectors(encoder).embed(names[1:2]), found[1:2])


def test_a_name_that_the_tower_would_cut_off_is_refused(encoder: Encoder) -> None:
    """Of 77 tokens one begins and one ends a text; "a photo of the large {}." has six besides the name."""
    longest = " ".join(69 * ["dog"])
    texts = NameVectors(encoder)
    assert texts.embed([longest, "dog"]).shape == (2, 16)
    for name in (f"{longest} dog", 160 * "woof! "):
        with pytest.raises(ConfigError) as refused:
            texts.embed([name])
        assert str(refused.value).startswith(f"the name '{name[:60]}…' is longer than the encoder reads (77 ")
        assert "\n" not in str(refused.value)
    assert len(texts) == 2
    # Cut off, other names would be one and the same.
    cat, bird = encoder.embed_text([f"{longest} dog dog dog dog dog {name}" for name in ("cat", "bird")])
    np.testing.assert_array_equal(cat, bird)


def test_what_threads_made_at_once_is_one(encoder: Encoder) -> None:
    kept: Kept[str, object] = Kept(2)
    both = threading.Barrier(2)
    got: list[object] = []

    def make() -> object:
        both.wait(10)
        return object()

    threads = [threading.Thread(target=lambda: got.append(kept.get("a", make))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got[0] is got[1] is kept.get("a", object)


def test_threads_may_share_it(encoder: Encoder) -> None:
    vectors = NameVectors(encoder, kept=3)
    names = [f"thing {number}" for number in range(8)]
    expected = {name: encoder.embed_text([name])[0] for name in names}
    wrong: list[str] = []

    def ask(seed: int) -> None:
        drawn = [names[number] for number in np.random.default_rng(seed).integers(0, 8, 40)]
        wrong.extend(name for name in drawn if not np.array_equal(vectors.embed([name])[0], expected[name]))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(vectors) == 3
