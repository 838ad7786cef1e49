"""Near-duplicates are folded under the best of them."""

import numpy as np

from for_ray.index.folding import fold_images, similarity

AXES = np.eye(8, dtype=np.float32)


def near(vector: int, cosine: float) -> np.ndarray:
    return (cosine * AXES[vector] + np.sqrt(1 - cosine**2) * AXES[7]).astype(np.float32)


def found(images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    offsets = np.cumsum([0, *(len(each) for each in images)])
    return np.arange(len(images)), offsets, np.concatenate(images).astype(np.float16)


def test_similarity() -> None:
    assert similarity(AXES[:3], AXES[[2, 0, 1]]) == 1.0
    assert similarity(AXES[:2], AXES[:1]) == (1.0 + 0.5) / 2
    assert similarity(AXES[:2], np.empty((0, 8), np.float32)) == 0.0


def test_copies_fold_under_the_first_that_is_kept() -> None:
    images = [AXES[:2], AXES[2:4], np.stack([near(0, 0.98), near(1, 0.98)]), AXES[[3, 2]], AXES[:1]]
    assert fold_images(found(images), np.array([0, 1, 2, 3, 4]), threshold=0.95).tolist() == [0, 1, 0, 1, 4]
    assert fold_images(found(images), np.array([3, 2, 0, 1]), threshold=0.95).tolist() == [0, 1, 1, 0]
    assert fold_images(found(images), np.array([0, 1, 2, 3]), threshold=0.99).tolist() == [0, 1, 2, 1]


def test_what_is_like_a_folded_image_alone_is_kept() -> None:
    """A chain: the second is like the first, the third like the second."""
    first = AXES[:1]
    second = np.array([[np.cos(0.3), np.sin(0.3), *6 * [0]]])
    third = np.array([[np.cos(0.6), np.sin(0.6), *6 * [0]]])
    assert fold_images(found([first, second, third]), np.arange(3), threshold=0.95).tolist() == [0, 0, 2]


def test_nothing_one_and_images_that_are_not_there() -> None:
    assert fold_images(found([AXES[:1]]), np.empty(0, np.int64), threshold=0.9).tolist() == []
    assert fold_images(found([AXES[:1]]), np.array([0]), threshold=0.9).tolist() == [0]
    assert fold_images(found([AXES[:1], AXES[:1]]), np.array([9, 0, 1]), threshold=0.9).tolist() == [0, 1, 1]
