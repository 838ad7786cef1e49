"""Decoding in a child process: what it gives, what it refuses, and what kills it."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest

from for_ray.errors import DataError, ForRayError
from for_ray.model.preprocess import Decoded
from for_ray.stages.apart import Apart

HANG_SECONDS = 0.5
"""What an image may take where the test has one that never ends."""


def decode(raw: bytes) -> Decoded:
    """A picture of the bytes; some of them do what broken decoders do."""
    if raw == b"kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if raw == b"exit":
        os._exit(3)
    if raw == b"hang":
        signal.pause()
    if raw == b"bad":
        raise DataError("not an image")
    if raw == b"bug":
        raise ZeroDivisionError("a mistake of ours")
    return Decoded(np.frombuffer(raw, np.uint8), width=os.getpid(), height=len(raw))


def decode_or_die_at_first(raw: bytes, *, died: Path) -> Decoded:
    """Dies while it decodes, unless it did so before: what ends a process need not be its image."""
    if not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(raw)


class _Loads:
    """A decoder that ends its process where it arrives, until `starts` has room for no more lines."""

    def __init__(self, starts: Path, *, num_deaths: int) -> None:
        self._starts, self._num_deaths = starts, num_deaths

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        with self._starts.open("a") as file:
            file.write("started\n")
        if self.num_starts <= self._num_deaths:
            os._exit(7)

    @property
    def num_starts(self) -> int:
        return len(self._starts.read_text().splitlines())

    def __call__(self, raw: bytes) -> Decoded:
        return decode(raw)


def test_one_child_decodes_one_image_after_the_other():
    with Apart(decode) as apart:
        first, second = apart.decode(b"one"), apart.decode(b"")
    assert bytes(first.pixels) == b"one"
    assert (first.height, second.height) == (3, 0)
    assert first.width == second.width != os.getpid()


def test_what_cannot_be_decoded_is_said_as_ever():
    with Apart(decode) as apart:
        with pytest.raises(DataError, match=r"^not an image$"):
            apart.decode(b"bad")
        with pytest.raises(ZeroDivisionError, match="a mistake of ours"):
            apart.decode(b"bug")
        assert apart.decode(b"good").height == 4


def test_only_the_image_that_kills_has_an_error():
    def outcome(raw: bytes) -> str:
        try:
            return bytes(apart.decode(raw).pixels).decode()
        except DataError as error:
            return str(error)

    given = [b"a", b"kill", b"b", b"exit", b"c", b"d"]
    with Apart(decode) as apart, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(outcome, given))
    killed = "decoding killed its process (signal 9, SIGKILL)"
    assert found == ["a", killed, "b", "decoding killed its process (exit code 3)", "c", "d"]


def test_an_image_whose_child_dies_once_is_not_to_blame(tmp_path):
    with Apart(partial(decode_or_die_at_first, died=tmp_path / "died")) as apart:
        assert bytes(apart.decode(b"good").pixels) == b"good"
    assert (tmp_path / "died").exists()


def test_a_child_that_died_between_two_images_is_no_strike_against_the_next(tmp_path):
    with Apart(decode) as apart:
        pid = apart.decode(b"one").width
        os.kill(pid, signal.SIGKILL)  # as Linux does where a neighbour takes the memory
        assert wait([apart._child.connection], 30)
        apart._decode = partial(decode_or_die_at_first, died=tmp_path / "died")
        # The idle death and this one are two, but only one of them happened at this image.
        assert apart.decode(b"two").height == 3
    assert (tmp_path / "died").exists()


def test_an_image_that_does_not_end_is_named_and_its_child_is_gone():
    with Apart(decode, seconds=HANG_SECONDS) as apart:
        pid = apart.decode(b"one").width
        with pytest.raises(DataError, match=r"^decoding did not end in 0\.5 s$"):
            apart.decode(b"hang")
        assert apart.decode(b"two").height == 3
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_child_that_nobody_waits_for_ends_by_itself():
    with Apart(decode, seconds=HANG_SECONDS) as apart:
        apart.decode(b"one")
        apart._child.connection.send_bytes(b"hang")  # and the one who asked is gone
        apart._child.process.join(30)
        assert apart._child.process.exitcode == -signal.SIGALRM


def test_a_child_that_does_not_start_at_first_is_started_again(tmp_path):
    loads = _Loads(tmp_path / "starts", num_deaths=1)
    with Apart(loads) as apart:
        assert apart.decode(b"one").height == 3
    assert loads.num_starts == 2


def test_children_that_do_not_start_blame_no_image(tmp_path):
    loads = _Loads(tmp_path / "starts", num_deaths=9)
    with Apart(loads) as apart, pytest.raises(ForRayError, match=r"does not start: exit code 7; ") as caught:
        apart.decode(b"one")
    assert loads.num_starts == 2
    assert not isinstance(caught.value, DataError)
    assert "\n" not in str(caught.value)


def test_a_child_that_is_never_ready_blames_no_image(monkeypatch):
    monkeypatch.setattr("for_ray.stages.apart.SECONDS_TO_START", 0.0)
    began = time.monotonic()
    with Apart(decode) as apart, pytest.raises(ForRayError, match="it was not ready in 0 s"):
        apart.decode(b"one")
    assert time.monotonic() - began < 30  # it was killed, not waited for


def test_the_child_ends_with_the_block():
    with Apart(decode) as apart:
        pid = apart.decode(b"x").width
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_nothing_is_started_for_no_images():
    with Apart(decode) as apart:
        pass
    assert apart._child is None
