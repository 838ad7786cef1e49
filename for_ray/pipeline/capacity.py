"""What an index of any size takes, by the settings: neither Ray nor a store of images is asked."""

from __future__ import annotations

from for_ray.config import IndexSettings
from for_ray.index.capacity import Capacity, Nodes, plan_capacity
from for_ray.index.plan import DEFAULT_MEMORY_BYTES
from for_ray.index.snapshots import list_published
from for_ray.pipeline.chosen_encoder import open_encoder
from for_ray.schema import Layout
from for_ray.storage import canonical_uri

GIGABYTE, ONE_BILLION = 1_000_000_000, 1_000_000_000


def nodes_of(settings: IndexSettings) -> Nodes:
    """The machines that the settings plan for."""
    return Nodes(int(settings.plan_node_memory * GIGABYTE), settings.plan_node_cpus, settings.plan_nodes)


def task_bytes(settings: IndexSettings) -> int:
    """Memory of a task that trains, builds or merges, as asked for; see `Cluster.planned_memory_bytes`."""
    return DEFAULT_MEMORY_BYTES if settings.task_memory is None else int(settings.task_memory * GIGABYTE)


def plans_of(
    settings: IndexSettings, dim: int, vectors_per_image: float, *, num_images: int, codec: str | None
) -> dict[str, Capacity]:
    """The plan of so many images beside that of a billion vectors, by the columns' names.

    Args:
        settings: Say the nodes and the recall.
        dim: D.
        vectors_per_image: On average.
        num_images: That are listed; may be 0.
        codec: Of the index; None where the plan chooses.

    Raises:
        ConfigError: The nodes hold no task or no segment of it.
    """
    sizes = {"now": round(vectors_per_image * num_images), "10⁹ vectors": ONE_BILLION}
    return {
        name: plan_capacity(
            num_vectors,
            dim,
            vectors_per_image=vectors_per_image,
            nodes=nodes_of(settings),
            codec=codec,
            target_recall=settings.target_recall,
            task_memory_bytes=task_bytes(settings),
        )
        for name, num_vectors in sizes.items()
    }


def run_plan(settings: IndexSettings) -> Capacity:
    """The plan of an index of `plan_vectors`.

    The encoder says D, and how many vectors an image has at most; that of the index where one is named.

    Args:
        settings: The job's, with `plan_vectors`.

    Raises:
        ConfigError: The codec is refused, or the nodes hold no task or no segment of it.
        DataError: The encoder is damaged.
        StorageError: The store of a named index refused.
    """
    bundle = open_encoder(settings, own=_published_bundle(settings.index))
    return plan_capacity(
        round(settings.plan_vectors or 0),
        bundle.dim,
        vectors_per_image=bundle.num_slots,
        nodes=nodes_of(settings),
        codec=None if settings.codec == "auto" else settings.codec,
        target_recall=settings.target_recall,
        task_memory_bytes=task_bytes(settings),
    )


def _published_bundle(index_uri: str) -> str | None:
    if not index_uri:
        return None
    layout = Layout(canonical_uri(index_uri))
    published = list_published(layout)
    return layout.bundle_uri(published[-1].fingerprint) if published else None
