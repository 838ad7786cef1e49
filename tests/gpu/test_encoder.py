"""Vectors, boxes and clusters of the GPU are those of the CPU, as far as float16 goes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from for_ray.model.bundle import Bundle, open_bundle
from for_ray.model.encoder import load_encoder
from for_ray.model.kmeans import spherical_kmeans
from for_ray.model.preprocess import decode

HEADS = ["clip", "dense", "sum", "cluster"]


@pytest.fixture(scope="module")
def pixels(book: Path) -> Tensor:
    """uint8 [16, 3, S, S] of the packaged encoder."""
    config = open_bundle("picturebook").config
    images = [
        decode(
            path.read_bytes(),
            image_size=config.image_size,
            resize_mode=config.resize_mode,
            interpolation=config.interpolation,
        ).pixels
        for path in sorted(book.iterdir())
    ]
    return torch.from_numpy(np.stack(images))


def bundle_of(head: str) -> Bundle:
    """The packaged encoder with a head; `sum` has random weights."""
    bundle = open_bundle("picturebook", head="dense")
    return dataclasses.replace(bundle, config=bundle.config.model_copy(update={"head": head, "head_seed": 0}))


@pytest.mark.parametrize(("precision", "least"), [("float32", 0.999), ("auto", 0.99)])
@pytest.mark.parametrize("head", HEADS)
def test_vectors_are_those_of_the_cpu(device, head, precision, least, pixels):
    bundle = bundle_of(head)
    here = load_encoder(bundle, device, precision=precision).encode(pixels)
    there = load_encoder(bundle, "cpu", precision="float32").encode(pixels)
    vectors, right = here.vectors.float().cpu(), there.vectors.float()
    assert here.vectors.device.type == device
    assert vectors.isfinite().all()
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(vectors.shape[:2]), atol=1e-3, rtol=0)
    # The best match among the other's slots: with the last bit of a float, clusters may trade places.
    matches = torch.einsum("bnd,bmd->bnm", vectors, right).amax(dim=2)
    assert matches.median() > least
    assert (matches > least).float().mean() > 0.95
    kept = here.keep.sum().item() / there.keep.sum().item()
    assert kept == pytest.approx(1.0, abs=0.05)
    if head != "cluster":  # its boxes are those of the cells that went to a cluster
        is_same = here.keep.cpu() & there.keep
        off = (here.boxes.float().cpu() - there.boxes.float()).abs().amax(dim=-1)[is_same]
        assert (off < 0.05).float().mean() > 0.95


def test_an_image_has_the_same_vectors_in_any_batch(device, pixels):
    encoder = load_encoder(bundle_of("sum"), device)
    together = encoder.encode(pixels).vectors.float().cpu()
    apart = torch.cat([encoder.encode(part).vectors.float().cpu() for part in pixels.split([1, 7, 8])])
    assert torch.einsum("bnd,bnd->bn", together, apart).min() > 0.995


def test_texts_find_the_images_that_they_find_on_the_cpu(device, pixels):
    names = ["a bicycle", "a dog", "an umbrella", "a violin"]
    bundle = open_bundle("picturebook")
    scores = []
    for where in (device, "cpu"):
        encoder = load_encoder(bundle, where)
        queries = torch.from_numpy(np.asarray(encoder.embed_text(names), np.float32))
        vectors = encoder.encode(pixels).vectors.float().cpu()
        scores.append(torch.einsum("vd,bnd->vbn", queries, vectors).amax(dim=2))
    torch.testing.assert_close(scores[0], scores[1], atol=0.01, rtol=0)


def test_clusters_are_those_of_the_cpu(device):
    generator = torch.Generator().manual_seed(0)
    directions = normalize(torch.randn(4, 6, 64, generator=generator), dim=-1)
    which = torch.randint(6, (4, 90), generator=generator)
    noise = 0.05 * torch.randn(4, 90, 64, generator=generator)
    points = normalize(directions.gather(1, which[..., None].expand(-1, -1, 64)) + noise, dim=-1)
    here, there = spherical_kmeans(points.to(device), 6), spherical_kmeans(points, 6)
    torch.testing.assert_close(here.centres.cpu(), there.centres, atol=1e-4, rtol=0)
    assert torch.equal(here.assignment.cpu(), there.assignment)
    assert here.centres.device.type == device


def test_clusters_of_noise_are_as_tight_as_those_of_the_cpu(device):
    points = normalize(torch.randn(3, 120, 32, generator=torch.Generator().manual_seed(1)), dim=-1)

    def tightness(where: str) -> float:
        found = spherical_kmeans(points.to(where), 10)
        own = found.centres.gather(1, found.assignment[..., None].expand(-1, -1, 32))
        return float((own * points.to(where)).sum(dim=-1).mean())

    assert tightness(device) == pytest.approx(tightness("cpu"), abs=0.01)
