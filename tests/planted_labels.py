"""A small labelled data set in COCO's format, and a table of its pseudo-labels, made of the real pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from safetensors.torch import save_file

from for_ray import storage
from for_ray.index import table
from for_ray.model.bundle import Bundle, open_bundle
from for_ray.model.encoder import load_encoder
from for_ray.model.preprocess import decode
from for_ray.model.pseudo_labels import label_images
from for_ray.model.slot_model import as_tokens
from for_ray.schema import LabelLayout, LabelRun, labels_schema

NAMES = ["apple", "bottle", "cat", "dog", "elephant", "fork", "giraffe", "horse", "kite", "lamp"]
BASE, NOVEL = ["dog", "cat", "kite", "fork"], ["horse", "apple"]
COLOURS = np.random.default_rng(7).integers(0, 255, (len(NAMES), 3))


def draw_dataset(folder: Path, num_images: int, *, seed: int = 0) -> str:
    """Write images of coloured fields, one colour a category, with their labels; what `--dataset` takes.

    The last image shows none of the categories. Needs the split that lies beside it: `folder/split.json`.
    """
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for number in range(num_images):
        shown = np.random.default_rng([seed, number]).choice(len(NAMES), 3, replace=False)
        shown = shown if number < num_images - 1 else np.array([NAMES.index("lamp")])
        fields = COLOURS[np.resize(shown, 16)].reshape(4, 4, 3).astype(np.uint8)
        file_name = f"{number:04d}.png"
        Image.fromarray(fields).resize((96, 96), Image.Resampling.NEAREST).save(folder / "images" / file_name)
        images.append({"id": number + 1, "file_name": file_name, "width": 96, "height": 96})
        annotations += [
            {"id": len(annotations) + place, "image_id": number + 1, "category_id": int(category) + 1}
            for place, category in enumerate(shown, start=1)
            if NAMES[category] in BASE + NOVEL
        ]
    for each in annotations:
        each |= {"bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}
    categories = [
        {"id": place, "name": name} for place, name in enumerate(NAMES, start=1) if name in BASE + NOVEL
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    (folder / "split.json").write_text(json.dumps({"base": BASE, "novel": NOVEL}))
    return f"coco:{folder / 'annotations.json'}:{folder / 'images'}"


def write_labels(
    folder: Path,
    images: Path,
    encoder: str = "picturebook",
    *,
    with_features: bool = True,
    broken: tuple[str, ...] = (),
    not_a_number: tuple[str, ...] = (),
) -> str:
    """Label the images of a folder as `jobs/pseudo_label.py` does; what `--labels` takes.

    Args:
        folder: For the table and what belongs to it.
        images: PNG files.
        encoder: As `--encoder`.
        with_features: Keep the backbone's features.
        broken: File names of images that get an error instead.
        not_a_number: File names of images whose features are NaN.
    """
    folder.mkdir(parents=True)
    layout = LabelLayout(str(folder))
    bundle = open_bundle(encoder, head="cluster", num_slots=4, allow_untrained=True)
    bundle.save(layout.bundle_uri)
    loaded = load_encoder(bundle, "cpu")
    text = torch.from_numpy(loaded.embed_text(NAMES))
    save_file({"text": text}, folder / "vocabulary.safetensors")
    (folder / "vocabulary.txt").write_text("".join(f"{name}\n" for name in NAMES))
    rows = [
        _row(path, loaded, text) if path.name not in broken else _broken_row(path)
        for path in sorted(images.iterdir())
    ]
    for row in rows:
        if Path(row["uri"]).name in not_a_number:
            row["features"] = np.full_like(row["features"], np.nan)
    run = _run(bundle, images, rows, loaded.logit_scale, with_features=with_features)
    storage.write_bytes(layout.run_uri, run.model_dump_json().encode())
    made = table.create_table(layout.table_uri, labels_schema(run))
    content = pa.Table.from_pylist(
        [{name: row[name] for name in labels_schema(run).names} for row in rows], labels_schema(run)
    )
    table.append(made, table.write_fragments(content, layout.table_uri))
    storage.write_bytes(layout.report_uri, b"<html>")
    return layout.output_uri


def _row(path: Path, encoder: Any, text: torch.Tensor) -> dict[str, Any]:
    config = encoder.bundle.config
    pixels = decode(
        path.read_bytes(),
        image_size=config.image_size,
        resize_mode=config.resize_mode,
        interpolation=config.interpolation,
    ).pixels[None]
    with torch.inference_mode():
        features = encoder.features(pixels)
        vectors = encoder.head(features, encoder.pooling).vectors
        found = label_images(vectors, text, logit_scale=encoder.logit_scale, threshold=0.1, most=3)
    kept = found.labels[0] >= 0
    entry = storage.stat(str(path))
    return {
        "uri": str(path), "etag": entry.etag, "size_bytes": entry.size_bytes, "width": 96, "height": 96,
        "error": None, "labels": found.labels[0][kept].tolist(), "encoded_at": None,
        "probabilities": found.probabilities[0][kept].tolist(),
        "features": as_tokens(features).half().flatten().numpy(),
        "grid": (features.prefix.shape[1], features.height, features.width, features.cells.shape[2]),
    }  # fmt: skip


def _broken_row(path: Path) -> dict[str, Any]:
    row = dict.fromkeys(("etag", "size_bytes", "width", "height", "encoded_at", "features"))
    return row | {"uri": str(path), "error": "not an image", "labels": [], "probabilities": []}


def _run(
    bundle: Bundle, images: Path, rows: list[Any], logit_scale: float, *, with_features: bool
) -> LabelRun:
    num_prefix, height, width, channels = next(row["grid"] for row in rows if "grid" in row)
    return LabelRun(
        dataset="planted",
        images_uri=str(images),
        encoder=bundle.name,
        fingerprint=bundle.fingerprint,
        backbone_fingerprint=bundle.backbone_fingerprint,
        text_fingerprint=bundle.text_fingerprint,
        head="cluster",
        num_slots=4,
        vocabulary="names.txt",
        vocabulary_sha256="0" * 64,
        num_names=len(NAMES),
        exclude_novel=False,
        dropped_names=(),
        threshold=0.1,
        num_labels=3,
        logit_scale=logit_scale,
        has_features=with_features,
        num_prefix=num_prefix,
        height=height,
        width=width,
        channels=channels,
    )
