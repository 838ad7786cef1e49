"""Small annotation files in the formats of COCO, LVIS v1 and nuImages, key for key as theirs are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COCO_IDS = {
    "person": 1,
    "bicycle": 2,
    "car": 3,
    "airplane": 5,
    "bus": 6,
    "cat": 17,
    "dog": 18,
    "wine glass": 46,
}
"""Some of COCO 2017's categories; its ids have gaps."""


def coco_content(
    labels: Mapping[int, Sequence[str]], *, year: int = 2017, categories: Mapping[str, int] = COCO_IDS
) -> dict[str, Any]:
    """`instances_val2017.json` or `instances_val2014.json`, by the categories of each image id.

    An annotation is a crowd where its name ends with `*`.
    """
    prefix = "COCO_val2014_" if year == 2014 else ""
    images = [
        {
            "license": 4,
            "file_name": f"{prefix}{image_id:012d}.jpg",
            "coco_url": f"http://images.cocodataset.org/val{year}/{prefix}{image_id:012d}.jpg",
            "height": 427,
            "width": 640,
            "date_captured": "2013-11-14 17:02:52",
            "flickr_url": "http://farm7.staticflickr.com/6116/6255196340_da26cf2c9e_z.jpg",
            "id": image_id,
        }
        for image_id in labels
    ]
    pairs = [(image_id, name) for image_id, names in labels.items() for name in names]
    return {
        "info": {"description": f"COCO {year} Dataset", "year": year},
        "licenses": [{"url": "http://creativecommons.org/licenses/by/2.0/", "id": 4, "name": "Attribution"}],
        "images": images,
        "annotations": [_coco_annotation(number, *pair, categories) for number, pair in enumerate(pairs, 1)],
        "categories": [
            {"supercategory": "thing", "id": category_id, "name": name}
            for name, category_id in categories.items()
        ],
    }


def _coco_annotation(number: int, image_id: int, name: str, ids: Mapping[str, int]) -> dict[str, Any]:
    outline: Any = [[10.5, 10.0, 20.0, 10.25, 20.0, 30.0]]
    is_crowd = name.endswith("*")
    return {
        "segmentation": {"counts": [272, 2, 4], "size": [427, 640]} if is_crowd else outline,
        "area": 100.25,
        "iscrowd": int(is_crowd),
        "image_id": image_id,
        "bbox": [10.5, 10.0, 9.5, 20.0],
        "category_id": ids[name.rstrip("*")],
        "id": number,
    }


LVIS_FREQUENCIES = {
    "aerosol_can": "c",
    "alarm_clock": "f",
    "applesauce": "r",
    "trash_can": "f",
    "triangle": "r",
}


def lvis_content(
    labels: Mapping[int, Sequence[str]],
    *,
    negatives: Mapping[int, Sequence[str]] | None = None,
    not_exhaustive: Mapping[int, Sequence[str]] | None = None,
    train: Sequence[int] = (),
) -> dict[str, Any]:
    """`lvis_v1_val.json`; its images lie in COCO's `val2017`, and those of `train` in `train2017`."""
    ids = {name: number for number, name in enumerate(LVIS_FREQUENCIES, 1)}

    def ids_of(given: Mapping[int, Sequence[str]] | None, image_id: int) -> list[int]:
        return [ids[name] for name in (given or {}).get(image_id, ())]

    images = [
        {
            "date_captured": "2013-11-14 16:28:13",
            "neg_category_ids": ids_of(negatives, image_id),
            "license": 4,
            "height": 427,
            "width": 640,
            "flickr_url": "http://farm8.staticflickr.com/7187/6967031859_5f08387bde_z.jpg",
            "coco_url": "http://images.cocodataset.org/"
            f"{'train' if image_id in train else 'val'}2017/{image_id:012d}.jpg",
            "not_exhaustive_category_ids": ids_of(not_exhaustive, image_id),
            "id": image_id,
        }
        for image_id in labels
    ]
    pairs = [(image_id, name) for image_id, names in labels.items() for name in names]
    return {
        "info": {"description": "LVIS v1.0", "version": "v1.0"},
        "annotations": [
            {
                "area": 7.5,
                "id": number,
                "segmentation": [[1.5, 2.0, 3.0, 4.0, 5.0, 6.0]],
                "image_id": image_id,
                "bbox": [1.5, 2.0, 3.5, 4.0],
                "category_id": ids[name],
            }
            for number, (image_id, name) in enumerate(pairs, 1)
        ],
        "images": images,
        "licenses": [],
        "categories": [
            {
                "image_count": 9,
                "synonyms": [name],
                "def": "a thing",
                "id": ids[name],
                "synset": f"{name}.n.01",
                "name": name,
                "frequency": frequency,
                "instance_count": 12,
            }
            for name, frequency in LVIS_FREQUENCIES.items()
        ],
    }


NUIMAGES_CATEGORIES = (
    "animal", "flat.driveable_surface", "human.pedestrian.adult", "human.pedestrian.child",
    "human.pedestrian.construction_worker", "human.pedestrian.personal_mobility",
    "human.pedestrian.police_officer", "human.pedestrian.stroller", "human.pedestrian.wheelchair",
    "movable_object.barrier", "movable_object.debris", "movable_object.pushable_pullable",
    "movable_object.trafficcone", "static_object.bicycle_rack", "vehicle.bicycle", "vehicle.bus.bendy",
    "vehicle.bus.rigid", "vehicle.car", "vehicle.construction", "vehicle.ego",
    "vehicle.emergency.ambulance", "vehicle.emergency.police", "vehicle.motorcycle", "vehicle.trailer",
    "vehicle.truck",
)  # fmt: skip


def token(name: str) -> str:
    """nuImages' kind of identifier: 32 hex digits."""
    return hashlib.md5(name.encode(), usedforsecurity=False).hexdigest()


def nuimages_tables(labels: Mapping[str, Sequence[str]]) -> dict[str, list[dict[str, Any]]]:
    """The tables by name; for each key frame `labels` has a name, and nuImages' categories in it.

    Each frame has a sweep before it and a lidar key frame beside it, as there.
    """
    tables: dict[str, list[dict[str, Any]]] = {
        "sample": [],
        "sample_data": [],
        "object_ann": [],
        "category": [
            {"token": token(name), "name": name, "description": "…"} for name in NUIMAGES_CATEGORIES
        ],
    }
    for frame, names in labels.items():
        tables["sample"].append(
            {
                "token": token(f"sample {frame}"),
                "timestamp": 1535385092150099,
                "log_token": token("log"),
                "key_camera_token": token(frame),
                "key_lidar_token": token(f"lidar {frame}"),
            }
        )
        tables["sample_data"] += [
            _sample_data(frame, f"sweeps/CAM_FRONT/n013-{frame}-before.jpg", f"sweep {frame}", False),
            _sample_data(frame, f"samples/CAM_FRONT/n013-{frame}.jpg", frame, True),
            _sample_data(frame, f"samples/LIDAR_TOP/n013-{frame}.pcd.bin", f"lidar {frame}", True),
        ]
        tables["object_ann"] += [
            {
                "token": token(f"{frame} {number}"),
                "category_token": token(name),
                "bbox": [0, 0, 5, 6],
                "mask": {"size": [900, 1600], "counts": "ZjlSMTAwMDAxTzEwMDAwME8xMDAwMDAw"},
                "attribute_tokens": [],
                "sample_data_token": token(frame),
            }
            for number, name in enumerate(names)
        ]
    return tables


def _sample_data(frame: str, file_name: str, name: str, is_key_frame: bool) -> dict[str, Any]:
    return {
        "token": token(name),
        "sample_token": token(f"sample {frame}"),
        "ego_pose_token": token("pose"),
        "calibrated_sensor_token": token("sensor"),
        "filename": file_name,
        "fileformat": file_name.rsplit(".", 1)[1],
        "width": 1600,
        "height": 900,
        "timestamp": 1535385092150099,
        "is_key_frame": is_key_frame,
        "prev": "",
        "next": "",
    }


def write_tables(folder: Path, tables: Mapping[str, Any]) -> None:
    """One JSON file a table."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
