"""Progress: lines where there is no terminal, each with what a person wants to know."""

from __future__ import annotations

import contextlib
import io

import pytest

from for_ray.schema import StageTime
from for_ray.stages import progress
from for_ray.stages.progress import Progress


class Clock:
    """A clock that tests wind."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_line_now_and_then_and_one_at_the_end(clock):
    stream = io.StringIO()
    with Progress(stream).stage("encode", total=1000) as update:
        for second in range(0, 50, 2):
            clock.now = float(second)
            update(second * 20)
        clock.now = 50.0
    lines = stream.getvalue().splitlines()
    assert lines[0] == "encode   200 of 1,000 images, 20/s, 40.0 s to go"
    assert len(lines) == 5
    assert lines[-1] == "encode   960 images in 50.0 s, 19 images/s"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(59.94, "59.9 s"), (61, "1 min 01 s"), (3599, "59 min 59 s"), (7260, "2 h 01 min")]
)
def test_durations_are_short(clock, seconds, shown):
    stream = io.StringIO()
    with Progress(stream).stage("verify"):
        clock.now = seconds
    assert stream.getvalue() == f"verify   done in {shown}\n"


def test_one_is_not_many(clock):
    stream = io.StringIO()
    with Progress(stream).stage("build", unit="segments") as update:
        update(1)
    assert stream.getvalue() == "build    1 segment in 0.0 s\n"


def test_a_failed_stage_is_not_called_done(clock):
    stream = io.StringIO()
    with pytest.raises(OSError, match="no"), Progress(stream).stage("build"):
        raise OSError("no")
    assert stream.getvalue() == ""


@pytest.mark.parametrize("is_quiet", [True, False])
def test_times_are_kept_of_stages_that_ended_also_of_one_that_failed(clock, is_quiet):
    told = Progress(io.StringIO(), is_quiet=is_quiet)
    with told.stage("list") as update:
        clock.now = 2.0
        update(3)
        update(7)
    with contextlib.suppress(KeyboardInterrupt), told.stage("build", unit="segments") as update:
        assert len(told.times) == 1
        update(1)
        clock.now = 5.5
        raise KeyboardInterrupt
    with told.stage("list"):
        pass
    assert told.times == [
        StageTime(name="list", seconds=2.0, done=7, unit="images"),
        StageTime(name="build", seconds=3.5, done=1, unit="segments"),
        StageTime(name="list", seconds=0.0, done=0, unit="images"),
    ]


def test_quiet_is_quiet(clock):
    stream = io.StringIO()
    quiet = Progress(stream, is_quiet=True)
    with quiet.stage("list") as update:
        clock.now = 100.0
        update(3)
    quiet.say("hello")
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_that_goes_away():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(stream).stage("encode", total=10) as update:
        update(5)
    last = stream.getvalue().splitlines()[-1]
    assert "\x1b[2K" in last
    assert "encode   5 images in " in last
