"""Decoding apart: in a child process, so that an image that kills its process takes no other with it."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self

from for_ray.errors import DataError
from for_ray.model.preprocess import Decoded

Decode = Callable[[bytes], Decoded]

SECONDS_TO_END = 5.0


class Apart:
    """A child process that decodes one image after the other; another takes its place when it dies.

    The child is started with the first image, and ends with the `with` block, or with this process.

    Args:
        decode: What the child calls; it must be importable there.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._lock = threading.Lock()
        self._child: tuple[multiprocessing.process.BaseProcess, Connection] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def decode(self, raw: bytes) -> Decoded:
        """What `decode` gives; threads take turns, so that the child's death has one image as its cause.

        Raises:
            DataError: As `decode` does, or: the image killed the child.
        """
        with self._lock:
            if self._child is None:
                self._child = _start(self._decode)
            connection = self._child[1]
            try:
                connection.send_bytes(raw)
                answer = connection.recv()
            except (EOFError, OSError):
                raise DataError(f"decoding killed its process ({self._end()})") from None
        if isinstance(answer, Exception):
            raise answer
        decoded: Decoded = answer
        return decoded

    def _end(self) -> str:
        """Let the child go; how it ended."""
        if self._child is None:
            return "never started"
        (process, connection), self._child = self._child, None
        connection.close()
        process.join(SECONDS_TO_END)
        if process.exitcode is None:
            process.kill()
            process.join()
        return _ending(process.exitcode or 0)


def _start(decode: Decode) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")  # a fork would share the threads' locks, and the S3 client
    ours, its = context.Pipe()
    process = context.Process(target=_serve, args=(its, decode), name="decoding", daemon=True)
    process.start()
    its.close()
    return process, ours


def _serve(connection: Connection, decode: Decode) -> None:
    _die_first()
    while True:
        try:
            raw = connection.recv_bytes()
        except EOFError:  # nobody asks any more
            return
        try:
            answer: Decoded | Exception = decode(raw)
        except Exception as error:  # noqa: BLE001 - it is raised where the answer is waited for
            answer = error
        connection.send(answer)


def _die_first() -> None:
    """Be what Linux kills when memory runs out: the task that waits then knows which image it was."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _ending(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    with suppress(ValueError):
        return f"signal {-exit_code}, {signal.Signals(-exit_code).name}"
    return f"signal {-exit_code}"
