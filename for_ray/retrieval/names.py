"""Vectors of names, the last used ones kept: people ask for the same things again and again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from for_ray.model.encoder import Encoder

NAMES_KEPT = 4096
"""16 MB at 1024 dimensions."""


class NameVectors:
    """The text tower of an encoder with a memory; threads may share it.

    A name is embedded by itself: its vector is the same to the last bit, whatever else is asked with it, as
    the pages of an answer need it.

    Args:
        encoder: Whose text tower.
        kept: Names whose vectors are held, at most.
    """

    def __init__(self, encoder: Encoder, *, kept: int = NAMES_KEPT) -> None:
        self.encoder = encoder
        self._kept = kept
        self._vectors: OrderedDict[str, NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._vectors)

    def embed(self, names: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors [n, D] of the names, in their order.

        Raises:
            ConfigError: A name is empty, or the tokenizer can't be had.
        """
        return np.stack([self._vector(name) for name in names])

    def _vector(self, name: str) -> NDArray[np.float32]:
        with self._lock:
            found = self._vectors.get(name)
            if found is not None:
                self._vectors.move_to_end(name)
                return found
        vector = np.asarray(self.encoder.embed_text([name])[0], np.float32)
        with self._lock:
            self._vectors[name] = vector
            while len(self._vectors) > self._kept:
                self._vectors.popitem(last=False)
        return vector
