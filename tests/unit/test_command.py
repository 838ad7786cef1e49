import signal
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from for_ray import command
from for_ray.command import how_ended, kept_sigterm, run_command
from for_ray.errors import ConfigError, DataError, StageError


def fails_with(error: BaseException) -> Callable[[], None]:
    def job() -> None:
        raise error

    return job


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("bad setting"), 2, "error: bad setting\n"),
        (DataError("bad file"), 2, "error: bad file\n"),
        (StageError("verify", "too few"), 1, f"error: {StageError('verify', 'too few')}\n"),
        (KeyboardInterrupt(), 130, "error: interrupted; run again\n"),
    ],
)
def test_refusals_become_one_line_and_an_exit_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(fails_with(error), advice="run again") == code
    assert capsys.readouterr().err == line


def test_a_finished_job_is_zero_and_a_bug_is_not_hidden() -> None:
    assert run_command(lambda: None) == 0
    with pytest.raises(RuntimeError, match="a bug"):
        run_command(fails_with(RuntimeError("a bug")))


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


def test_sigterm_interrupts_and_a_second_one_leaves_the_clean_up_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    cleaned = []

    def job() -> None:
        try:
            terminate()
        except KeyboardInterrupt as error:
            terminate()
            cleaned.append(how_ended(error))
            raise KeyboardInterrupt from None  # as Ray does: of its own

    assert run_command(job, advice="run again") == 143
    assert cleaned == ["stopped by SIGTERM"]
    assert capsys.readouterr().err == "error: stopped by SIGTERM; run again\n"
    assert signal.getsignal(signal.SIGTERM) == before
    # The next job of the process knows nothing of it.
    assert run_command(fails_with(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_later_sigterm_interrupts_what_the_first_did_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []

    def job() -> None:
        for seconds in (3600.0, 3600.0, 0.0):
            monkeypatch.setattr(command, "CLEAN_UP_SECONDS", seconds)
            try:
                terminate()
            except KeyboardInterrupt:  # as a callback that swallows what it raises
                heard.append(True)
            else:
                heard.append(False)
        terminate()

    assert run_command(job) == 143
    assert heard == [True, False, True]


def test_sigterms_that_are_left_out_put_nothing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 106.0, 112.0])
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    def job() -> None:
        with pytest.raises(KeyboardInterrupt):
            terminate()
        terminate()
        with pytest.raises(KeyboardInterrupt):
            terminate()

    assert run_command(job) == 0


def test_a_handler_that_the_job_sets_is_the_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    heard = []

    def serve() -> None:
        signal.signal(signal.SIGTERM, lambda *_: heard.append("SIGTERM"))
        terminate()

    assert run_command(serve) == 0
    assert heard == ["SIGTERM"]


def start_ray(*, is_told: bool) -> None:
    """What `ray.init` does to the signal."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(number)

    signal.signal(signal.SIGTERM, leave)
    if is_told:
        terminate()


@pytest.mark.parametrize("when", ["while it starts", "later"])
def test_rays_handler_does_not_stay(when: str) -> None:
    def job() -> None:
        with kept_sigterm():
            start_ray(is_told=when == "while it starts")
        terminate()

    assert run_command(job) == 143


def test_where_no_handler_was_set_rays_stays() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with kept_sigterm():
            start_ray(is_told=False)
        with pytest.raises(SystemExit):
            terminate()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_command_may_run_in_another_thread() -> None:
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run_command(lambda: None)))
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (ZeroDivisionError("by nought"), "ZeroDivisionError: by nought"),
        (SystemExit(), "SystemExit"),
        (RuntimeError("no disk:\n  full\r\n\n"), "RuntimeError: no disk: full"),
    ],
)
def test_what_has_ended_a_job_is_one_line(error: BaseException, told: str) -> None:
    assert how_ended(error) == told
