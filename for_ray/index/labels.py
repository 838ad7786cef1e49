"""The record of a table of pseudo-labels, `labels.json`: read, and held against what is wanted."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from for_ray.errors import ConfigError, DataError
from for_ray.schema import LABELS_FORMAT, LabelLayout, LabelRun
from for_ray.storage import ObjectGone, read_bytes, shown


def read_label_run(layout: LabelLayout) -> LabelRun | None:
    """What the labels at a place were made with; None where there are none.

    Raises:
        DataError: The record is not readable, or of another format.
        StorageError: The store refused.
    """
    try:
        content = read_bytes(layout.run_uri)
    except ObjectGone:
        return None
    try:
        run = LabelRun.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"{shown(layout.run_uri)} is no record of labels: {field}: {first['msg']}; give another place"
        ) from None
    if run.format != LABELS_FORMAT:
        raise DataError(
            f"{shown(layout.run_uri)} is of format {run.format}, expected {LABELS_FORMAT}; make them again"
        )
    return run


def refuse_other_settings(run: LabelRun, wanted: dict[str, Any], *, output_uri: str) -> None:
    """Refuse to go on with labels that were made with other settings.

    Args:
        run: What they were made with.
        wanted: Names of its fields, and the values that they must have.
        output_uri: For the message.

    Raises:
        ConfigError: Says what differs.
    """
    held = {name: getattr(run, name) for name in wanted}
    others = [name for name, value in wanted.items() if value != held[name]]
    if others:
        told = ", ".join(f"{name} {_short(held[name])}, not {_short(wanted[name])}" for name in others)
        raise ConfigError(
            f"{shown(output_uri)} holds labels of other settings: {told}; give another --output"
        )


def _short(value: object) -> str:
    """A value for a message; of a checksum its beginning."""
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and text.isalnum() else text
