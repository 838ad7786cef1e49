"""The settings of each job: one frozen model, read from flags, environment, a TOML file and defaults.

A flag wins over the variable `FOR_RAY_…`, the variable over the file of `--config`, the file over the
default. Whatever is unknown or out of range is refused before anything starts, in one line that names it.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import os
import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliPositionalArg, CliSettingsSource, EnvSettingsSource

from for_ray.errors import ConfigError

ENV_PREFIX = "FOR_RAY_"

Head = Literal["sum", "cluster", "dense", "clip"]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class IndexSettings(_Settings):
    """Keep an index of a folder or bucket of images up to date.

    Settings come from flags over FOR_RAY_… variables over the --config file over the defaults. Exit code 0:
    done, or nothing to do; 2: the settings, the images or the store are at fault and nothing was published;
    1: a stage failed in the middle (run again: what was committed is not encoded again); 130: interrupted.
    """

    images: str = Field(
        min_length=1,
        description="the images: a folder, s3://bucket/prefix, a Parquet manifest (uri, etag) or tars",
    )
    index: str = Field(
        min_length=1, description="the index: a folder or s3://bucket/prefix; made when it is not there"
    )
    encoder: str | None = Field(
        None,
        min_length=1,
        description="a bundle, or open_clip:MODEL@PRETRAINED; by default the index's own, or `picturebook` "
        "for a new index. Another encoder than the index's builds beside it and takes over when published",
    )
    head: Head | None = Field(
        None, description="how the feature map becomes vectors; when left out, the encoder's own"
    )
    num_slots: int | None = Field(
        None, ge=1, le=256, description="vectors of an image, at most; default: the encoder's"
    )
    image_size: int | None = Field(
        None, ge=32, le=4096, description="side of the model's input in pixels; default: the encoder's"
    )
    keep_threshold: float | None = Field(
        None,
        gt=0,
        le=1,
        description="slots of an image whose cosine is above this are stored once; default: the encoder's",
    )
    config: Path | None = Field(None, description="a TOML file with any of these settings")
    dry_run: bool = Field(False, description="say what would be done, and write nothing")
    json_: bool = Field(
        False, alias="json", description="print one line of JSON as the last line of the output"
    )
    batch_size: int = Field(64, ge=1, le=4096, description="images that the model takes at once")
    read_threads: int = Field(16, ge=1, le=256, description="objects that a reading task fetches at once")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="where images are encoded: auto takes the GPUs that are there, cuda waits for some",
    )
    min_actors: int = Field(
        1, ge=1, description="encoding actors to start with, one GPU each where there are GPUs"
    )
    max_actors: int | None = Field(
        None, ge=1, description="encoding actors at most; default: what the cluster has room for"
    )
    commit_seconds: float = Field(
        10.0, gt=0, le=3600, description="seconds between commits of what was encoded"
    )
    max_bad_fraction: float = Field(
        0.05, ge=0, le=1, description="share of images that may be unreadable; above it nothing is published"
    )
    codec: str | None = Field(
        None,
        min_length=1,
        description="FAISS factory string of the segments, with an IVF; `auto`: from the number of "
        "vectors; default: what the index was built with, else `auto`",
    )
    target_recall: float = Field(
        0.95, ge=0, le=1, description="recall at 50 against exact search that nprobe is raised for"
    )

    @model_validator(mode="after")
    def _ranges_fit(self) -> IndexSettings:
        if self.max_actors is not None and self.max_actors < self.min_actors:
            raise ValueError(f"max_actors ({self.max_actors}) is below min_actors ({self.min_actors})")
        return self


class SearchSettings(_Settings):
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


SettingsT = TypeVar("SettingsT", bound=_Settings)


class _Parser(argparse.ArgumentParser):
    """A parser that raises its complaint instead of printing the usage and ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists the flags")

    def format_help(self) -> str:
        """The help, without the default of flags that have none."""
        return re.sub(r"\s+\(default:\s+\x00\)", "", super().format_help())


def read_settings(model: type[SettingsT], arguments: Sequence[str]) -> SettingsT:
    """The settings of a job; `--help` among the arguments prints the help and ends the process.

    Args:
        model: Which job's settings.
        arguments: The command line without the program's name.

    Raises:
        ConfigError: One line about the first thing that is unknown, missing or out of range.
    """
    flags = _read_flags(model, arguments)
    variables = _read_variables(model)
    config_path = flags.get("config") or variables.get("config")
    values = _read_file(model, Path(config_path)) if config_path else {}
    try:
        return model.model_validate({**values, **variables, **flags})
    except ValidationError as error:
        raise ConfigError(_first_complaint(error)) from None


def _read_flags(model: type[_Settings], arguments: Sequence[str]) -> dict[str, Any]:
    class Flags(BaseSettings, model):  # type: ignore[misc, valid-type]
        pass

    parser = _Parser(
        description=inspect.getdoc(model),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    known = [f"--{name.replace('_', '-')}" for name in _names(model)]
    for argument in arguments:
        flag = argument.split("=", 1)[0]
        if flag.startswith("--") and len(flag) > 2 and flag not in [*known, "--help"]:
            raise ConfigError(f"no such flag: {flag}{_similar(flag, known)}; --help lists them")
    source: CliSettingsSource[Any] = CliSettingsSource(
        Flags,
        cli_parse_args=list(arguments),
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_parse_none_str="\0",  # so that nobody's query or folder named "None" becomes none
        cli_implicit_flags="toggle",
        cli_kebab_case=True,
        root_parser=parser,
    )
    return source()


def _read_variables(model: type[_Settings]) -> dict[str, Any]:
    class Variables(BaseSettings, model):  # type: ignore[misc, valid-type]
        pass

    # All jobs share one prefix, so that one environment serves them all.
    known = sorted(
        {f"{ENV_PREFIX}{name.upper()}" for each in (IndexSettings, SearchSettings) for name in _names(each)}
    )
    for name in sorted(os.environ):
        if name.startswith(ENV_PREFIX) and name not in known:
            raise ConfigError(f"no such setting: the environment variable {name}{_similar(name, known)}")
    return EnvSettingsSource(Variables, env_prefix=ENV_PREFIX, env_prefix_target="all")()


def _read_file(model: type[_Settings], path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: is not TOML: {error}") from None
    values = {name.replace("-", "_"): value for name, value in values.items()}
    for name in values:
        if name not in _names(model):
            raise ConfigError(f"--config {path}: no such setting: {name}{_similar(name, _names(model))}")
    return values


def _names(model: type[_Settings]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _similar(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def _first_complaint(error: ValidationError) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    flag = f"--{name.replace('_', '-')}"
    if first["type"] == "missing":
        return f"{flag} is missing; --help lists the flags"
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return f"{flag} (or {ENV_PREFIX}{name.upper()}): {message}, got {first['input']!r}" if name else message
