"""Measure how well images are found by what they show, on labelled images; `--help` lists the settings.

python jobs/evaluate.py --dataset picturebook:DIR --encoder picturebook --encoder picturebook#clip
python jobs/evaluate.py --dataset coco:instances_val2017.json:s3://bucket/val2017 --index s3://bucket/index
python jobs/evaluate.py --dataset folder:DIR --task knn --encoder s3://bucket/tuned/bundle
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

if importlib.util.find_spec("for_ray") is None:  # a copy that is not installed, as `ray job submit` makes it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from for_ray.command import run_command
from for_ray.config import EvaluateSettings, read_settings


def main(arguments: list[str]) -> int:
    """Run the job; its exit code."""
    return run_command(lambda: _run(arguments))


def _run(arguments: list[str]) -> None:
    settings = read_settings(EvaluateSettings, arguments)

    from for_ray.pipeline.evaluate import run_evaluate
    from for_ray.pipeline.evaluate_tasks import TASKS, run_task
    from for_ray.stages.progress import Progress
    from for_ray.stages.results import print_evaluation

    run = run_task if settings.task in TASKS else run_evaluate
    evaluation = run(settings, progress=Progress())
    if settings.json_:
        print(json.dumps(evaluation.to_json(), ensure_ascii=False), flush=True)
    else:
        print_evaluation(evaluation, sys.stdout)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
