"""Near-duplicates are folded under the best of them."""

import numpy as np

from for_ray.index.folding import fold_images

AXES = np.eye(8, dtype=np.float32)


def near(vector: int, cosine: float) -> np.ndarray:
    return (cosine * AXES[vector] + np.sqrt(1 - cosine**2) * AXES[7]).astype(np.float32)


def found(images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    offsets = np.cumsum([0, *(len(each) for each in images)])
    return np.arange(len(images)), offsets, np.concatenate(images).astype(np.float16)


def similarity(left: np.ndarray, right: np.ndarray) -> float:
    cosines = left.astype(np.float32) @ right.astype(np.float32).T
    return float((cosines.max(axis=0).mean() + cosines.max(axis=1).mean()) / 2)


def test_as_pair_by_pair() -> None:
    rng = np.random.default_rng(0)
    themes = rng.standard_normal((6, 8))
    images = []
    for number in range(60):
        vectors = themes[rng.choice(6, rng.integers(1, 5), replace=False)] + rng.normal(0, 0.25, (1, 8))
        images.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
        images.append(images[number // 2] if number % 5 == 0 else np.empty((0, 8)))
    order = rng.permutation(len(images))
    held = [each.astype(np.float16) for each in images]
    for threshold in (0.93, 0.97):
        leaders = np.arange(len(order))
        for place in range(len(order)):
            for earlier in range(place):
                pair = held[order[earlier]], held[order[place]]
                is_kept = leaders[earlier] == earlier
                if is_kept and all(map(len, pair)) and similarity(*pair) >= threshold:
                    leaders[place] = earlier
                    break
        folded = int((leaders != np.arange(len(order))).sum())
        assert 5 < folded < 60
        assert fold_images(found(images), order, threshold=threshold).tolist() == leaders.tolist()


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
