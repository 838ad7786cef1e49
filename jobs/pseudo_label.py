"""Label the images of a data set with the names of a large vocabulary; `--help` lists the settings.

python jobs/pseudo_label.py --dataset coco:instances_train2017.json:train2017 --encoder E --output s3://bucket/labels
ray job submit --working-dir . -- python jobs/pseudo_label.py --dataset … --output …
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("for_ray") is None:  # a copy that is not installed, as `ray job submit` makes it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from for_ray.command import run_command
from for_ray.config import LabelSettings, read_settings


def main(arguments: list[str]) -> int:
    """Run the job; its exit code."""
    return run_command(lambda: _run(arguments), advice="run again to go on: what was committed stays")


def _run(arguments: list[str]) -> None:
    settings = read_settings(LabelSettings, arguments)

    from for_ray.pipeline.label import run_label
    from for_ray.stages.progress import Progress
    from for_ray.stages.report import print_summary

    summary = run_label(settings, progress=Progress())
    print_summary(summary)
    if settings.json_:
        print(summary.model_dump_json(), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
