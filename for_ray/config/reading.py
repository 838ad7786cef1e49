"""Settings are read here: from flags, over the environment, a TOML file, a preset, and defaults."""

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

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, EnvSettingsSource

from for_ray.errors import ConfigError

ENV_PREFIX = "FOR_RAY_"

_PRESETS = Path(__file__).parent / "presets"


class Settings(BaseModel):
    """The settings of a job; its direct subclasses are all the jobs that there are."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Preset = Literal["coco", "lvis", "nuimages", "paper", "picturebook"]
"""Of `presets/`: a table for each job."""

SettingsT = TypeVar("SettingsT", bound=Settings)


class _Parser(argparse.ArgumentParser):
    """A parser that raises its complaint instead of printing the usage and ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists the flags")

    def format_help(self) -> str:
        """The help, without the default of flags that have none."""
        return re.sub(r"\s+\(default:\s+\x00?\)", "", super().format_help())


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
    values = {**values, **variables, **flags}
    if values.get("preset"):
        values = {**read_preset(model, str(values["preset"])), **values}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_first_complaint(error)) from None


def _read_flags(model: type[Settings], arguments: Sequence[str]) -> dict[str, Any]:
    class Flags(BaseSettings, model):  # type: ignore[misc, valid-type]
        pass

    parser = _Parser(
        description=inspect.getdoc(model),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    known = [f"--{name.replace('_', '-')}" for name in _names(model)]
    for argument in arguments:
        flag = argument.split("=", 1)[0].replace("--no-", "--", 1)  # argparse knows which of them take it
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


def _read_variables(model: type[Settings]) -> dict[str, Any]:
    class Variables(BaseSettings, model):  # type: ignore[misc, valid-type]
        pass

    # All jobs share one prefix, so that one environment serves them all.
    known = sorted(
        {f"{ENV_PREFIX}{name.upper()}" for each in Settings.__subclasses__() for name in _names(each)}
    )
    for name in sorted(os.environ):
        if name.startswith(ENV_PREFIX) and name not in known:
            raise ConfigError(f"no such setting: the environment variable {name}{_similar(name, known)}")
    return EnvSettingsSource(Variables, env_prefix=ENV_PREFIX, env_prefix_target="all")()


def _read_file(model: type[Settings], path: Path) -> dict[str, Any]:
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


def read_preset(model: type[Settings], name: str) -> dict[str, Any]:
    """What a preset of this package says of a job, by the names of its settings.

    Raises:
        ConfigError: There is none of this name.
    """
    known = sorted(path.stem for path in _PRESETS.glob("*.toml"))
    if name not in known:
        raise ConfigError(f"no such preset: {name}{_similar(name, known)}; expected {', '.join(known)}")
    values = tomllib.loads((_PRESETS / f"{name}.toml").read_text(encoding="utf-8"))
    return dict(values[model.__name__.removesuffix("Settings").lower()])


def _names(model: type[Settings]) -> list[str]:
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
