"""The settings of `jobs/serve.py`."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, model_validator

from for_ray.config.reading import Settings

LEAST_TOKEN_LETTERS = 16


class ServeSettings(Settings):
    """Serve the search page and the HTTP API of an index; a snapshot that is published is switched to.

    --local runs in this process, on this machine. Without it the service runs on Ray: replicas that come and
    go with the load, and come back when they die, on the cluster of RAY_ADDRESS, or on this machine.

    Settings come from flags over FOR_RAY_… variables over the --config file over the defaults. Exit code 0:
    ended by SIGINT or SIGTERM; 2: the settings, the index or the store are at fault.
    """

    index: str = Field(min_length=1, description="the index: a folder or s3://bucket/prefix")
    host: str = Field(
        "127.0.0.1", min_length=1, description="address to listen on; 0.0.0.0 or :: for all of the machine's"
    )
    port: int = Field(8000, ge=1, le=65_535, description="port to listen on")
    token: SecretStr | None = Field(
        None,
        description=f"what a client has to know, {LEAST_TOKEN_LETTERS} letters at least; as FOR_RAY_TOKEN it "
        "is in no list of processes",
    )
    no_token: bool = Field(False, description="let everybody ask who reaches a --host that is not loopback")
    allow_host: str | None = Field(
        None,
        min_length=1,
        description="names, with commas between, under which clients reach the service, besides --host: "
        "those of a proxy before it, of the machine",
    )
    local: bool = Field(False, description="run in this process, without Ray")
    replicas: int = Field(1, ge=1, le=1000, description="replicas at least; each opens the index")
    max_replicas: int | None = Field(
        None, ge=1, le=1000, description="replicas at most, as the load asks; default: --replicas"
    )
    shards: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="Ray actors that each replica shares the segments out among, on all nodes; default: it "
        "maps them itself",
    )
    encoder: str | None = Field(
        None,
        min_length=1,
        description="refuse to start unless the index was made with this bundle or open_clip encoder",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "cpu", description="where questions are encoded; auto: on a GPU where there is one"
    )
    refresh_seconds: float = Field(
        10.0, ge=0.1, le=86_400.0, description="how often to look whether another snapshot is published"
    )
    grace_seconds: float = Field(
        300.0,
        ge=0.0,
        le=86_400.0,
        description="for how long the snapshot before stays open after a switch, for further pages of its "
        "answers; until the next one is opened at most",
    )
    examples: str | None = Field(
        None, min_length=1, description="questions that the page proposes, with semicolons between"
    )
    max_body_mb: float = Field(
        16.0, gt=0.0, le=1024.0, description="largest request, in MB: pictures that are searched with"
    )
    requests_per_second: float = Field(
        50.0, ge=0.0, description="of one client address and replica, on average; 0: as many as come"
    )
    max_looked_at: int = Field(
        100_000,
        ge=2000,
        description="images whose vectors one question reads at most, where few answer its AND and NOT: then "
        "the answer is what was found, and says so",
    )
    cache: Path | None = Field(
        None, description="where segments of a bucket are kept on disk; default: the user's cache folder"
    )
    config: Path | None = Field(None, description="a TOML file with any of these settings")

    @property
    def most_replicas(self) -> int:
        """`max_replicas` with its default."""
        return self.replicas if self.max_replicas is None else self.max_replicas

    @property
    def max_body_bytes(self) -> int:
        """`max_body_mb` in bytes."""
        return int(self.max_body_mb * 1_000_000)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the service."""
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def other_hosts(self) -> tuple[str, ...]:
        """`allow_host` as a list."""
        return _parts(self.allow_host, ",")

    @property
    def proposed(self) -> tuple[str, ...]:
        """`examples` as a list."""
        return _parts(self.examples, ";")

    @model_validator(mode="after")
    def _is_guarded(self) -> ServeSettings:
        if self.token is not None:
            self._check_token(self.token.get_secret_value())
        elif not self.is_loopback and not self.no_token:
            raise ValueError(
                f"--host {self.host} is open to other machines: set FOR_RAY_TOKEN to what clients have to "
                "know, or give --no-token to let everybody ask"
            )
        return self

    def _check_token(self, token: str) -> None:
        """What is said never shows the token."""
        if self.no_token:
            raise ValueError("give either --token or --no-token")
        if len(token) < LEAST_TOKEN_LETTERS or not (token.isascii() and token.isprintable()) or " " in token:
            raise ValueError(
                f"--token (or FOR_RAY_TOKEN): expected {LEAST_TOKEN_LETTERS} ASCII letters or more without "
                f"spaces, got {len(token)} that may be others: take what `openssl rand -hex 32` prints"
            )

    @model_validator(mode="after")
    def _replicas_are_of_ray(self) -> ServeSettings:
        if self.most_replicas < self.replicas:
            found = f"--max-replicas {self.max_replicas} is below --replicas {self.replicas}"
            raise ValueError(f"{found}: raise it, or leave it out")
        if self.local and (self.most_replicas > 1 or self.shards is not None):
            raise ValueError("--local is one process: leave --replicas, --max-replicas and --shards out")
        return self


def _parts(text: str | None, separator: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(separator) if part.strip())
