"""The settings of `jobs/search.py`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator
from pydantic_settings import CliPositionalArg

from for_ray.config.reading import Settings


class SearchSettings(Settings):
    """Find the images of an index that show what the words, or the picture, say.

    Words: a dog · a dog AND a frisbee · a street NOT a car · (a cat OR a dog) AND a ball · "salt AND pepper".
    Each name of an AND has a box of its own; in quotation marks AND is a word like others.

    Settings come from flags over FOR_RAY_… variables over the --config file over the defaults. Exit code 0:
    done; 2: the settings, the index or the store are at fault; 130: interrupted; 143: ended by SIGTERM.
    """

    query: CliPositionalArg[str | None] = Field(None, description="what to look for, in words")
    index: str = Field(min_length=1, description="the index: a folder or s3://bucket/prefix")
    image: str | None = Field(
        None, min_length=1, description="look for this picture, a file or s3://…, instead of words"
    )
    region: str | None = Field(
        None,
        description="of --image, or of the image that --like IMAGE_ID names, the object in this box: "
        "x0,y0,x1,y1 as fractions of width and height",
    )
    like: str | None = Field(
        None,
        min_length=1,
        description="look for more like an object of the index: IMAGE_ID:SLOT of a hit (see --json), or "
        "IMAGE_ID for all that the image shows",
    )
    top: int = Field(50, ge=1, le=10_000, description="images to show, at most")
    page: str | None = Field(
        None, min_length=1, description="the images behind an answer's last: the token that it ended with"
    )
    under: str | None = Field(
        None, min_length=1, description="only images whose uri begins so: a folder, s3://bucket/prefix"
    )
    glob: str | None = Field(
        None, min_length=1, description="only images whose uri matches: * any letters, ? one, [a-c] a choice"
    )
    filter: str | None = Field(
        None,
        min_length=1,
        description="only images for which this holds, as SQL over the index's columns, those of the "
        "manifest among them: \"split = 'val' AND camera = 2\"",
    )
    min_score: float | None = Field(
        None, ge=-1.0, le=1.0, description="only images with this score or a higher one"
    )
    fold: bool = Field(False, description="show images that are nearly the same once, the best of them")
    fold_at: float = Field(
        0.935, gt=0.0, le=1.0, description="similarity from which --fold takes images for the same"
    )
    unwanted_above: float | None = Field(
        None,
        ge=-1.0,
        le=1.0,
        description="score from which an image shows what a NOT rules out; default: taken from the index",
    )
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

    @property
    def box(self) -> tuple[float, float, float, float] | None:
        """`region` as numbers."""
        if self.region is None:
            return None
        x0, y0, x1, y1 = map(float, self.region.split(","))
        return x0, y0, x1, y1

    @model_validator(mode="after")
    def _asks_one_thing(self) -> SearchSettings:
        if sum(each is not None for each in (self.query, self.image, self.like)) != 1:
            raise ValueError("give either words to look for or --image FILE or --like IMAGE_ID:SLOT")
        if self.region is not None and self.query is not None:
            raise ValueError(
                "--region is one of a picture: give --image FILE or --like IMAGE_ID, and no words"
            )
        return self

    @model_validator(mode="after")
    def _region_is_a_box(self) -> SearchSettings:
        try:
            x0, y0, x1, y1 = self.box or (0, 0, 1, 1)
        except ValueError:
            x0 = y0 = x1 = y1 = -1.0
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            expected = "x0,y0,x1,y1 with 0 <= x0 < x1 <= 1 and likewise y"
            raise ValueError(f"--region: expected {expected}, got {self.region!r}")
        return self
