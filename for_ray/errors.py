"""The errors that `for_ray` raises on purpose.

    ForRayError
    ├── ConfigError    the settings are wrong: fix a flag, a variable or the TOML file
    ├── DataError      the data is wrong: fix the images, the manifest or the index
    ├── StorageError   the store refused: says which uri, and why
    └── StageError     a stage of the pipeline could not go on: carries its name

Every message is one line that says what, where, expected, got, and what to do. Arguments go by position
to `super().__init__`, so that an error can be pickled out of a Ray worker.
"""


class ForRayError(Exception):
    """Anything that `for_ray` refuses to do; jobs print it as one line and end with exit code 2."""


class ConfigError(ForRayError):
    """A setting is missing, unknown or out of range."""


class DataError(ForRayError):
    """Images, a manifest, a bundle or an index are not what they should be."""


class StorageError(ForRayError):
    """The object store or the disk refused a request."""


class StageError(ForRayError):
    """A stage of the pipeline stopped.

    Args:
        stage: The stage's name, as in `design`: list, diff, encode, build, verify, publish.
        reason: What happened and what to do, in one line.
    """

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(stage, reason)
        self.stage = stage
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.stage}: {self.reason}"
