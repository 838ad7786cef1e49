"""The settings of each job: one frozen model, read from flags, environment, a TOML file and defaults.

A flag wins over the variable `FOR_RAY_…`, the variable over the file of `--config`, the file over a preset,
a preset over the default. Whatever is unknown or out of range is refused before anything starts, in one line
that names it.
"""

from for_ray.config.evaluate import EvaluateSettings
from for_ray.config.finetune import FinetuneSettings
from for_ray.config.index import IndexSettings
from for_ray.config.label import LabelSettings
from for_ray.config.pseudo_caption import PseudoCaptionSettings
from for_ray.config.reading import read_settings
from for_ray.config.search import SearchSettings
from for_ray.config.serve import ServeSettings

__all__ = [
    "EvaluateSettings",
    "FinetuneSettings",
    "IndexSettings",
    "LabelSettings",
    "PseudoCaptionSettings",
    "SearchSettings",
    "ServeSettings",
    "read_settings",
]
