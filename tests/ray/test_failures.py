"""What Ray Data makes of the error of a function, and of the death of its process."""

from __future__ import annotations

import os
import signal
from typing import Any

import pyarrow as pa
import pytest
import ray
from ray.data import DataContext
from ray.exceptions import RayError

from for_ray.errors import StageError, StorageError
from for_ray.stages.encode import data_context, quiet_options
from for_ray.stages.failures import crash_of, failures

pytestmark = pytest.mark.slow


def fill(_: pa.Table) -> pa.Table:
    raise OSError(28, "No space left on device", "/images")


def refuse(_: pa.Table) -> pa.Table:
    raise StorageError("cannot read s3://b/k: access denied")


def die(_: pa.Table) -> pa.Table:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def wait(block: pa.Table) -> pa.Table:
    ray.get(ray.remote(max_retries=0)(die).remote(block))
    return block


def raised_by(function: Any) -> Exception:
    with DataContext.current(data_context()), quiet_options():
        mapped = ray.data.range(1).map_batches(
            function, batch_size=None, batch_format="pyarrow", num_cpus=0.5, max_retries=1
        )
        with pytest.raises(RayError) as caught:
            list(mapped.iter_batches(batch_size=None))
    return caught.value


@pytest.mark.usefixtures("ray_address")
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (fill, "OSError: [Errno 28] No space left on device: '/images'"),
        (refuse, "cannot read s3://b/k: access denied"),
    ],
)
def test_a_function_that_raises_is_no_crash(function, reason):
    error = raised_by(function)
    assert crash_of(error) is None
    with pytest.raises(StageError) as caught, failures("encode"):
        raise error
    assert str(caught.value) == f"encode: {reason}"


@pytest.mark.usefixtures("ray_address")
@pytest.mark.parametrize("function", [die, wait])
def test_a_process_that_dies_is_one(function):
    assert "The worker died unexpectedly" in (crash_of(raised_by(function)) or "")
