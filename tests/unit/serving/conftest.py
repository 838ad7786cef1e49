"""An index of small real images, and the application that serves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from fastapi import FastAPI
from numpy.typing import NDArray
from PIL import Image
from starlette.testclient import TestClient

from for_ray import storage
from for_ray.index import snapshots
from for_ray.model.bundle import Bundle
from for_ray.retrieval import OpenIndex, open_index
from for_ray.serving.app import make_app
from for_ray.serving.current import Current
from for_ray.serving.service import Limits, Service
from tests.planted import Planted, PlantedIndex, at_cosines

TOKEN = "a token of many letters"
LEFT, RIGHT, MIDDLE = (0.0, 0.0, 0.4, 1.0), (0.6, 0.2, 1.0, 0.8), (0.2, 0.2, 0.8, 0.6)
EVIL = "<img src=x onerror=alert(1)>.jpg"
SIZE = (200, 100)


def current_of(planted: PlantedIndex) -> Current:
    """The latest snapshot of an index, opened in this process."""

    def open_snapshot(snapshot_id: int | None, beside: OpenIndex | None) -> OpenIndex:
        return open_index(planted.uri, snapshot_id=snapshot_id, beside=beside)

    def latest_id() -> int:
        return snapshots.list_published(planted.layout)[-1].snapshot_id

    return Current(open_snapshot, latest_id, refresh_seconds=10.0)


def browser(app: FastAPI, address: str = "127.0.0.1") -> TestClient:
    """A client that knows no token; what the application doesn't catch is an answer, as for a real one."""
    return TestClient(
        app, base_url="http://localhost", raise_server_exceptions=False, client=(address, 50_000)
    )


@dataclass(frozen=True)
class Served:
    """An index, its files, and its service without a limit of the rate."""

    planted: PlantedIndex
    folder: Path
    service: Service

    def client(self, **changes: object) -> TestClient:
        """Of a service that is another in some respects; limits by their names."""
        own = {name: changes.pop(name) for name in list(changes) if not hasattr(self.service, name)}
        limits = replace(self.service.limits, **own)  # type: ignore[arg-type]
        return browser(make_app(replace(self.service, limits=limits, **changes)))  # type: ignore[arg-type]


def embed(bundle: Bundle) -> Callable[[str], NDArray[np.float32]]:
    """The text tower of a bundle."""
    from for_ray.model.encoder import load_encoder

    encoder = load_encoder(bundle, device="cpu")
    return lambda name: encoder.embed_text([name])[0]


@pytest.fixture(scope="session")
def served(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Nine images; the lower the id, the more each shows what "a dog" says; one of them is quarantined.

    Ids: 0 to 5 are JPEG files of `SIZE`, 3 is named `EVIL`, 4 is quarantined, 5 has no size in the table; 6
    is HTML, 7 is gone, 8 was changed.
    """
    folder = tmp_path_factory.mktemp("served")
    planted = PlantedIndex.make(folder / "index", tiny_bundle)
    dog = embed(tiny_bundle)("a dog")
    names = ["0.jpg", "1.jpg", "2.jpg", EVIL, "4.jpg", "5.jpg", "6.html", "7.jpg", "8.jpg"]
    images = []
    for number, name in enumerate(names):
        path = folder / name
        Image.new("RGB", SIZE, (number * 20, 90, 160)).save(path, "JPEG")
        if number == 6:
            path.write_text("<script>alert(1)</script>")
        error = "truncated" if number == 4 else None
        vectors = at_cosines(dog, 0.9 - number / 10, 0.1, -0.2)
        width, height = SIZE if number != 5 else (None, None)
        images.append(
            Planted(
                str(path),
                vectors if error is None else np.empty((0, len(dog))),
                (MIDDLE, LEFT, RIGHT) if error is None else (),
                storage.stat(str(path)).etag,
                error,
                width,
                height,
            )
        )
    (folder / "7.jpg").unlink()
    Image.new("RGB", (30, 30)).save(folder / "8.jpg", "JPEG")
    planted.add(images)
    planted.publish(nprobe=2)
    current = current_of(planted)
    limits = Limits(requests_per_second=0)
    service = Service(
        "photos", current, lambda: snapshots.list_snapshots(planted.layout), limits, examples=("a dog",)
    )
    yield Served(planted, folder, service)
    current.close()


@pytest.fixture(scope="session")
def client(served: Served) -> TestClient:
    """Of the service, which asks for no token."""
    return served.client()
