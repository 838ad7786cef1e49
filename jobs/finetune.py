"""Fine-tune an encoder: its head on labels and pseudo-labels, or its towers; `--help` lists the settings.

python jobs/finetune.py --dataset coco:instances_train2017.json:s3://bucket/train2017 --preset coco \
                        --labels s3://bucket/labels --output s3://bucket/for
python jobs/finetune.py --recipe mcip --dataset folder:s3://bucket/things --captions s3://bucket/captions \
                        --encoder open_clip:ViT-L-14-336@openai --output s3://bucket/mcip
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("for_ray") is None:  # a copy that is not installed, as `ray job submit` makes it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from for_ray.command import run_command
from for_ray.config import FinetuneSettings, read_settings


def main(arguments: list[str]) -> int:
    """Run the job; its exit code."""
    return run_command(lambda: _run(arguments), advice="run again to go on from the last epoch")


def _run(arguments: list[str]) -> None:
    settings = read_settings(FinetuneSettings, arguments)

    from for_ray.pipeline.finetune import run_finetune
    from for_ray.pipeline.tower_tuning import run_tower_tuning
    from for_ray.stages.finetune_report import print_finetuned
    from for_ray.stages.progress import Progress

    run = run_finetune if settings.recipe == "for" else run_tower_tuning
    summary = run(settings, progress=Progress())
    print_finetuned(summary)
    if settings.json_:
        print(summary.model_dump_json(), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
