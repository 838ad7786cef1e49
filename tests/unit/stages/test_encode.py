"""How many actors encode, and on what."""

from __future__ import annotations

import pytest

from for_ray.stages.encode import Pool, choose_pool


@pytest.mark.parametrize(
    ("resources", "options", "expected"),
    [
        ({"CPU": 8.0}, {}, Pool(1, 8, 0, 0.5)),
        ({"CPU": 8.0}, {"max_actors": 3}, Pool(1, 3, 0, 0.5)),
        ({"CPU": 8.0}, {"min_actors": 4, "max_actors": 4}, Pool(4, 4, 0, 0.5)),
        ({"CPU": 8.0, "GPU": 2.0}, {}, Pool(1, 2, 1, 0)),
        ({"CPU": 8.0, "GPU": 2.0}, {"device": "cpu"}, Pool(1, 8, 0, 0.5)),
        ({"CPU": 8.0}, {"device": "cuda", "max_actors": 16}, Pool(1, 16, 1, 0)),
        ({"CPU": 8.0}, {"device": "cuda"}, Pool(1, 1, 1, 0)),
        ({"CPU": 8.0}, {"num_batches": 2}, Pool(1, 2, 0, 0.5)),
        ({"CPU": 8.0}, {"num_batches": 1, "min_actors": 4}, Pool(1, 1, 0, 0.5)),
        ({}, {}, Pool(1, 1, 0, 0.5)),
    ],
)
def test_the_pool_fits_the_cluster_and_the_work(resources, options, expected):
    assert choose_pool(resources, **{"num_batches": 1000, **options}) == expected


@pytest.mark.parametrize("cpus", [1, 2, 3, 8, 64])
def test_reading_and_writing_find_room_beside_the_actors(cpus):
    """With every actor at work there is half a CPU left for a task: no deadlock."""
    pool = choose_pool({"CPU": float(cpus)}, num_batches=10**6)
    assert cpus - pool.max_actors * pool.num_cpus >= 0.5
