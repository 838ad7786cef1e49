"""Vectors of names and pictures, the last used ones kept: the same things are asked for again and again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from for_ray.errors import ConfigError
from for_ray.retrieval.question import shortened

if TYPE_CHECKING:
    from for_ray.model.encoder import Encoder

NAMES_KEPT = 4096
"""16 MB at 1024 dimensions."""

PICTURES_KEPT = 128
"""16 MB at 1024 dimensions and 32 slots: further pages, and other regions of a picture, cost no encoding."""

Key = TypeVar("Key")
Value = TypeVar("Value")


class Kept(Generic[Key, Value]):
    """Values by keys, the last used ones; threads may share it.

    Args:
        most: Values that are held.
        most_bytes: That they take together; the last used one is held even if it alone takes more.
        num_bytes: What a key and its value take.
    """

    def __init__(
        self, most: int, *, most_bytes: int = 0, num_bytes: Callable[[Key, Value], int] = lambda *_: 0
    ) -> None:
        self._most, self._most_bytes, self._num_bytes = most, most_bytes, num_bytes
        self._held_bytes = 0
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of a key, the very same for as long as it is held; made outside of the lock."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            if key not in self._values:  # else another thread made it too
                self._values[key] = value
                self._held_bytes += self._num_bytes(key, value)
            value = self._values[key]
            self._values.move_to_end(key)
            while self._is_over():
                self._held_bytes -= self._num_bytes(*self._values.popitem(last=False))
        return value

    def _is_over(self) -> bool:
        has_others = len(self._values) > 1
        return len(self._values) > self._most or (has_others and self._held_bytes > self._most_bytes)


class NameVectors:
    """The text tower of an encoder with a memory; threads may share it.

    What pictures were asked with is remembered too, in `pictures`, by what is in their files.

    A name is embedded by itself: its vector is the same to the last bit, whatever else is asked with it, as
    the pages of an answer need it.

    Args:
        encoder: Whose text tower.
        kept: Names whose vectors are held, at most.
    """

    def __init__(self, encoder: Encoder, *, kept: int = NAMES_KEPT) -> None:
        self.encoder = encoder
        self.pictures: Kept[tuple[str, str], tuple[NDArray[np.float32], ...]] = Kept(PICTURES_KEPT)
        self._vectors: Kept[str, NDArray[np.float32]] = Kept(kept)

    def __len__(self) -> int:
        return len(self._vectors)

    def embed(self, names: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors [n, D] of the names, in their order.

        Raises:
            ConfigError: A name is empty or longer than the text tower reads, or the tokenizer can't be had.
        """
        return np.stack([self._vector(name) for name in names])

    def _vector(self, name: str) -> NDArray[np.float32]:
        return self._vectors.get(name, lambda: self._embed(name))

    def _embed(self, name: str) -> NDArray[np.float32]:
        if not self.encoder.reads_whole(name):
            most = self.encoder.context_length
            found = f"the name {shortened(name, 60)!r} is longer than the encoder reads"
            raise ConfigError(f"{found} ({most} tokens, those of its prompts among them): use fewer words")
        return np.asarray(self.encoder.embed_text([name])[0], np.float32)
