"""The encoder of the index job: the one that was asked for, the index's own, or the default one."""

from __future__ import annotations

from for_ray.config import IndexSettings
from for_ray.model.bundle import Bundle, check_indexable, open_bundle

DEFAULT_ENCODER = "picturebook"


def open_encoder(settings: IndexSettings, *, own: str | None) -> Bundle:
    """Open it, with the head and its numbers as the settings want them.

    Args:
        settings: The job's.
        own: The bundle that the index was published with; None where it was not.

    Raises:
        ConfigError: There is no such encoder, or it gives an image more vectors than an index holds.
        DataError: The encoder is damaged.
        StorageError: The store refused.
    """
    bundle = open_bundle(
        settings.encoder or own or DEFAULT_ENCODER,
        head=settings.head,
        num_slots=settings.num_slots,
        image_size=settings.image_size,
        keep_threshold=settings.keep_threshold,
    )
    check_indexable(bundle)
    return bundle
