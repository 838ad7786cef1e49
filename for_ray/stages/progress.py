"""Progress that a person can follow, on stderr: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from for_ray.reports.page import shown_seconds
from for_ray.schema import StageTime

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Tells what stage a run is in, how far, how fast, and how long it will take.

    Args:
        stream: Where it is told.
        is_quiet: Say nothing at all.

    Attributes:
        times: Of the stages that have ended, also of one that failed; in the order in which they ended.
    """

    def __init__(self, stream: TextIO | None = None, *, is_quiet: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._is_quiet = is_quiet
        self.times: list[StageTime] = []

    def say(self, message: str) -> None:
        """One line, at once."""
        if not self._is_quiet:
            print(message, file=self._stream, flush=True)

    @contextmanager
    def stage(
        self, name: str, *, total: int | None = None, unit: str = "images"
    ) -> Iterator[Callable[[int], None]]:
        """Follow a stage; its name, count and seconds are said at its end.

        Args:
            name: Of the stage.
            total: How many there are; None where that is not known.
            unit: What is counted.

        Yields:
            To be called with how many are done.
        """
        started, done = time.monotonic(), 0
        try:
            with self._shown(name, total=total, unit=unit) as show:

                def update(count: int) -> None:
                    nonlocal done
                    done = count
                    show(count)

                yield update
        finally:
            seconds = time.monotonic() - started
            self.times.append(StageTime(name=name, seconds=seconds, done=done, unit=unit))
        rate = f", {done / seconds:,.0f} {unit}/s" if done >= seconds >= 1 else ""
        counted = f"{done:,} {unit if done != 1 else unit.removesuffix('s')}" if done else "done"
        self.say(f"{name:<8} {counted} in {shown_seconds(seconds)}{rate}")

    @contextmanager
    def _shown(self, name: str, *, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
        if self._is_quiet:
            yield lambda _: None
        elif self._stream.isatty():
            with _bar(self._stream, name, total=total, unit=unit) as show:
                yield show
        else:
            yield _Lines(self, name, total=total, unit=unit)


class _Lines:
    """A line of text every few seconds."""

    def __init__(self, progress: Progress, name: str, *, total: int | None, unit: str) -> None:
        self._progress, self._name, self._total, self._unit = progress, name, total, unit
        self._started = self._told = time.monotonic()

    def __call__(self, count: int) -> None:
        now = time.monotonic()
        if now - self._told < SECONDS_BETWEEN_LINES:
            return
        self._told = now
        rate = count / (now - self._started)
        line = f"{self._name:<8} {count:,}"
        if self._total:
            line += f" of {self._total:,}"
        line += f" {self._unit}, {rate:,.0f}/s"
        if self._total and rate:
            line += f", {shown_seconds(max(0, self._total - count) / rate)} to go"
        self._progress.say(line)


@contextmanager
def _bar(stream: TextIO, name: str, *, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    from rich import progress
    from rich.console import Console

    columns = [
        progress.SpinnerColumn(),
        progress.TextColumn(f"{name:<8}"),
        progress.BarColumn(),
        progress.TextColumn("{task.completed:,.0f}" + (f" of {total:,}" if total else "") + f" {unit}"),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TimeRemainingColumn(),
    ]
    started = time.monotonic()
    with progress.Progress(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task(name, total=total, rate="")

        def show(count: int) -> None:
            rate = count / max(1e-3, time.monotonic() - started)
            bar.update(task, completed=count, rate=f"{rate:,.0f}/s")

        yield show
