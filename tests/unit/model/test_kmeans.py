"""k-means against brute force, scikit-learn and its own promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn.functional import normalize

from for_ray.model.kmeans import spherical_kmeans


def blobs(
    num_images: int, num_points: int, dim: int, num_blobs: int, *, spread: float = 0.3, seed: int = 0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = normalize(torch.randn(num_images, num_blobs, dim, generator=generator), dim=-1)
    which = torch.randint(num_blobs, (num_images, num_points, 1), generator=generator).expand(-1, -1, dim)
    noise = torch.randn(num_images, num_points, dim, generator=generator) * spread / dim**0.5
    return normalize(centres.gather(1, which) + noise, dim=-1)


def objective(points: Tensor, assignment: Tensor, num_clusters: int) -> float:
    """Sum of cosines to the own centre: Σ over clusters of the length of the sum of members."""
    members = torch.nn.functional.one_hot(assignment, num_clusters).to(points.dtype)
    return float((members.transpose(-1, -2) @ points).norm(dim=-1).sum())


def inertia(points: Tensor, assignment: Tensor) -> float:
    total = 0.0
    for cluster in assignment.unique():
        members = points[assignment == cluster]
        total += float((members - members.mean(dim=0)).square().sum())
    return total


def test_well_separated_blobs_are_found() -> None:
    points = blobs(3, 60, 32, 5, spread=0.05)
    truth = (points @ points.transpose(1, 2)) > 0.9
    found = spherical_kmeans(points, 5).assignment
    assert torch.equal(found[:, :, None] == found[:, None, :], truth)


def test_small_sets_get_nearly_the_best_of_all_partitions() -> None:
    points = blobs(4, 7, 3, 2, spread=0.5, seed=1)
    found = spherical_kmeans(points, 2).assignment
    for image, assignment in zip(points, found, strict=True):
        best = max(
            objective(image, torch.tensor(labels), 2) for labels in itertools.product((0, 1), repeat=7)
        )
        assert objective(image, assignment, 2) > 0.995 * best


def test_inertia_is_scikit_learns() -> None:
    points = blobs(6, 196, 64, 30, spread=0.9, seed=2)
    ours = spherical_kmeans(points, 50).assignment
    total = sum(inertia(image, assignment) for image, assignment in zip(points, ours, strict=True))
    reference = sum(KMeans(50, n_init=1, random_state=0).fit(image.numpy()).inertia_ for image in points)
    assert total <= 1.02 * reference


def test_the_result_is_a_fixed_point() -> None:
    points = blobs(4, 100, 16, 10, spread=0.8, seed=3)
    centres, assignment = spherical_kmeans(points, 12)
    nearest = (points @ centres.transpose(1, 2)).argmax(dim=-1)
    assert torch.equal(nearest, assignment)
    members = torch.nn.functional.one_hot(assignment, 12).float()
    torch.testing.assert_close(centres, normalize(members.transpose(1, 2) @ points, dim=-1))


def test_an_image_is_clustered_alike_in_any_batch() -> None:
    points = blobs(6, 80, 16, 8, spread=0.8, seed=4)
    together = spherical_kmeans(points, 9)
    for order in ([5, 0, 3], [2], [1, 4]):
        apart = spherical_kmeans(points[order], 9)
        assert torch.equal(apart.assignment, together.assignment[order])
        torch.testing.assert_close(apart.centres, together.centres[order])


def test_more_iterations_change_nothing_after_the_end() -> None:
    """What a GPU does, which never looks whether it has finished."""
    points = blobs(3, 80, 16, 8, spread=0.8, seed=5)
    assert torch.equal(
        spherical_kmeans(points, 9).assignment, spherical_kmeans(points, 9, max_iterations=200).assignment
    )


def test_the_seed_decides() -> None:
    points = blobs(2, 80, 16, 20, spread=1.5, seed=6)
    first = spherical_kmeans(points, 9, seed=1).assignment
    assert torch.equal(first, spherical_kmeans(points, 9, seed=1).assignment)
    assert not torch.equal(first, spherical_kmeans(points, 9, seed=2).assignment)


@pytest.mark.parametrize("num_distinct", [1, 2, 5])
def test_no_cluster_is_empty_even_of_equal_points(num_distinct: int) -> None:
    distinct = normalize(torch.randn(2, num_distinct, 8, generator=torch.Generator().manual_seed(7)), dim=-1)
    points = distinct.repeat(1, 12 // num_distinct + 1, 1)[:, :12]
    centres, assignment = spherical_kmeans(points, 8)
    assert all(row.unique().numel() == 8 for row in assignment)
    assert bool(centres.isfinite().all())
    torch.testing.assert_close((points @ centres.transpose(1, 2)).amax(dim=-1), torch.ones(2, 12))


def test_an_emptied_cluster_takes_the_farthest_point() -> None:
    from for_ray.model.kmeans import _fill_empty

    cosines = torch.tensor([[0.9, 0.2, 0.8, 0.95, 0.1]])
    assignment = torch.tensor([[0, 0, 0, 2, 2]])  # 1 and 3 are empty; points 0 and 3 lead their clusters
    assert _fill_empty(cosines, assignment, 4).tolist() == [[0, 3, 0, 2, 1]]


def test_as_many_clusters_as_points() -> None:
    points = blobs(2, 10, 8, 10, spread=1.0, seed=8)
    assert all(sorted(row.tolist()) == list(range(10)) for row in spherical_kmeans(points, 10).assignment)


@pytest.mark.parametrize("num_clusters", [0, 6])
def test_impossible_numbers_are_refused(num_clusters: int) -> None:
    with pytest.raises(ValueError, match="1 <="):
        spherical_kmeans(torch.ones(2, 5, 3), num_clusters)
