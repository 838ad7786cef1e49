"""The settings of `jobs/search.py`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator
from pydantic_settings import CliPositionalArg

from for_ray.config.reading import Settings


class SearchSettings(Settings):
    """Find the images of an index that show what the words, or the picture, say.

    Settings come from flags over FOR_RAY_… variables over the --config file over the defaults. Exit code 0:
    done; 2: the settings, the index or the store are at fault; 130: interrupted.
    """

    query: CliPositionalArg[str | None] = Field(None, description="what to look for, in words")
    index: str = Field(min_length=1, description="the index: a folder or s3://bucket/prefix")
    image: str | None = Field(
        None, min_length=1, description="look for this picture, a file or s3://…, instead of words"
    )
    top: int = Field(50, ge=1, le=10_000, description="images to show, at most")
    snapshot: int | None = Field(
        None, ge=0, description="a published snapshot by its number; default: the latest"
    )
    encoder: str | None = Field(
        None,
        min_length=1,
        description="refuse to search unless the index was made with this bundle or open_clip encoder",
    )
    config: Path | None = Field(None, description="a TOML file with any of these settings")
    json_: bool = Field(False, alias="json", description="print the hits as JSON")
    sheet: Path | None = Field(None, description="write a picture of the top images with their boxes")

    @model_validator(mode="after")
    def _asks_one_thing(self) -> SearchSettings:
        if (self.query is None) == (self.image is None):
            raise ValueError("give either words to look for or --image FILE")
        return self
