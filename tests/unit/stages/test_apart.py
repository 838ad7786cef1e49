"""Decoding in a child process: what it gives, what it refuses, and what kills it."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from for_ray.errors import DataError
from for_ray.model.preprocess import Decoded
from for_ray.stages.apart import Apart


def decode(raw: bytes) -> Decoded:
    """A picture of the bytes; some of them do what broken decoders do."""
    if raw == b"kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if raw == b"exit":
        os._exit(3)
    if raw == b"bad":
        raise DataError("not an image")
    if raw == b"bug":
        raise ZeroDivisionError("a mistake of ours")
    return Decoded(np.frombuffer(raw, np.uint8), width=os.getpid(), height=len(raw))


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


def test_the_child_ends_with_the_block():
    with Apart(decode) as apart:
        pid = apart.decode(b"x").width
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_nothing_is_started_for_no_images():
    with Apart(decode) as apart:
        pass
    assert apart._child is None
