"""Turn an S3 Inventory into a manifest that `jobs/index.py --images` takes, a batch of rows at a time.

    python deploy/inventory_to_manifest.py s3://bucket/…/2026-11-25T01-00Z/manifest.json s3://bucket/frames.parquet

The inventory is one of current versions, in Parquet, with the optional fields Size and ETag. Keys in Parquet
inventories are taken as they are; in CSV inventories they are URL-encoded, and a manifest's uris are not.
What is an image goes by its name, as where the whole bucket is listed, but tars are not looked into.
"""

from __future__ import annotations

import json
import sys

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from for_ray.stages.listing import IMAGE_SUFFIXES, is_hidden
from for_ray.storage import arrow_filesystem

SCHEMA = pa.schema([("uri", pa.string()), ("etag", pa.string()), ("size_bytes", pa.int64())])
IMAGES = rf"(?i)\.({'|'.join(suffix[1:] for suffix in sorted(IMAGE_SUFFIXES))})$"


def main(source: str, target: str) -> None:
    """Write the manifest; whole or not at all in a bucket.

    Args:
        source: The inventory's `manifest.json`.
        target: A Parquet file.
    """
    store, path = arrow_filesystem(source)
    with store.open_input_stream(path) as file:
        inventory = json.load(file)
    bucket = inventory["destinationBucket"].removeprefix("arn:aws:s3:::")
    paths = [f"{bucket}/{each['key']}" for each in inventory["files"]]
    rows = ds.dataset(paths, format="parquet", filesystem=store)
    columns = {
        "uri": pc.binary_join_element_wise(
            pc.scalar("s3:/"), pc.field("bucket"), pc.field("key"), pc.scalar("/")
        ),
        "etag": pc.field("e_tag"),
        "size_bytes": pc.field("size"),
        "key": pc.field("key"),
    }
    is_image = pc.match_substring_regex(pc.field("key"), IMAGES)
    target_store, path = arrow_filesystem(target)
    with target_store.open_output_stream(path) as file, pq.ParquetWriter(file, SCHEMA) as writer:
        for batch in rows.to_batches(columns=columns, filter=is_image):
            is_seen = pa.array([not is_hidden(key) for key in batch["key"].to_pylist()], pa.bool_())
            writer.write_batch(batch.select(SCHEMA.names).filter(is_seen).cast(SCHEMA))


if __name__ == "__main__":
    main(*sys.argv[1:])
