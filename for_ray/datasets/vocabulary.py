"""Lists of category names: ImageNet-21K's, and anyone's own from a text file."""

from __future__ import annotations

import functools
from pathlib import Path

from for_ray.errors import ConfigError


@functools.cache
def imagenet21k_lemmas() -> tuple[tuple[str, ...], ...]:
    """All names of every ImageNet-21K class, from timm's list.

    Returns:
        21,843 tuples in timm's order of classes; each holds the class's lemmas as written there
        (`("person", "individual", ...)`), at least one. A lemma may belong to several classes.
    """
    from timm.data import ImageNetInfo  # imports torch: seconds that `--help` need not wait for

    classes = ImageNetInfo("imagenet21k")
    return tuple(
        tuple(lemma.strip() for lemma in classes.index_to_description(index).split(","))
        for index in range(classes.num_classes())
    )


def imagenet21k_names() -> list[str]:
    """The first lemma of every ImageNet-21K class, 21,843 strings; a few classes share theirs."""
    return [lemmas[0] for lemmas in imagenet21k_lemmas()]


def read_names(path: Path) -> list[str]:
    """Read a vocabulary from a UTF-8 text file with one name a line.

    Returns:
        The names in the file's order, stripped; empty lines and repetitions are left out.

    Raises:
        ConfigError: The file cannot be read, is not UTF-8, or names nothing.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the names in {path}: {error}; give a UTF-8 file, one name a line"
        ) from error
    names = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not names:
        raise ConfigError(f"{path} names nothing; give a UTF-8 file with one name a line")
    return names
