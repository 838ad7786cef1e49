from collections.abc import Callable

import pytest

from for_ray.command import run_command
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
        (KeyboardInterrupt(), 130, "error: stopped; run again\n"),
    ],
)
def test_refusals_become_one_line_and_an_exit_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(fails_with(error), when_interrupted="stopped; run again") == code
    assert capsys.readouterr().err == line


def test_a_finished_job_is_zero_and_a_bug_is_not_hidden() -> None:
    assert run_command(lambda: None) == 0
    with pytest.raises(RuntimeError, match="a bug"):
        run_command(fails_with(RuntimeError("a bug")))
