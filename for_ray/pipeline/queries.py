"""The queries that recall is measured with: kept in the index, so that a night need not load a text tower."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from for_ray.datasets.vocabulary import imagenet21k_names
from for_ray.model.bundle import Bundle, open_bundle
from for_ray.schema import Layout
from for_ray.storage import ObjectGone, read_bytes, write_bytes

NUM_QUERIES = 64
"""Text queries that recall is measured with: names of ImageNet-21K, evenly from the list."""


def recall_queries(layout: Layout, fingerprint: str, bundle: Bundle | None = None) -> NDArray[np.float32]:
    """Unit vectors [Q, D] of an encoder; encoded on the CPU when they are not in the index yet.

    Args:
        layout: The index.
        fingerprint: Of the encoder, which determines the vectors.
        bundle: The encoder, to be asked and its answer kept; None: the index's own, and nothing is written.

    Raises:
        DataError: The bundle is damaged.
        StorageError: The store refused.
    """
    uri = layout.queries_uri(fingerprint)
    try:
        kept: NDArray[np.float32] = np.load(io.BytesIO(read_bytes(uri)), allow_pickle=False)
    except (ObjectGone, ValueError, EOFError):  # not there, or cut short: they are made anew
        pass
    else:
        return kept
    from for_ray.model.encoder import load_encoder

    names = imagenet21k_names()
    encoder = load_encoder(bundle or open_bundle(layout.bundle_uri(fingerprint), allow_untrained=True), "cpu")
    vectors = np.asarray(encoder.embed_text(names[:: len(names) // NUM_QUERIES][:NUM_QUERIES]), np.float32)
    if bundle is not None:
        content = io.BytesIO()
        np.save(content, vectors, allow_pickle=False)
        write_bytes(uri, content.getvalue())
    return vectors
