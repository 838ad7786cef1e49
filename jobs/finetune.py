"""Fine-tune an encoder's head on labels and pseudo-labels; `--help` lists the settings.

python jobs/finetune.py --dataset coco:instances_train2017.json:s3://bucket/train2017 --preset coco \
                        --labels s3://bucket/labels --output s3://bucket/for
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("for_ray") is None:  # a copy that is not installed, as `ray job submit` makes it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from for_ray.config import FinetuneSettings, read_settings
from for_ray.errors import ForRayError, StageError


def main(arguments: list[str]) -> int:
    """Run the job; its exit code."""
    try:
        settings = read_settings(FinetuneSettings, arguments)

        from for_ray.pipeline.finetune import run_finetune
        from for_ray.stages.finetune_report import print_finetuned
        from for_ray.stages.progress import Progress

        summary = run_finetune(settings, progress=Progress())
        print_finetuned(summary)
        if settings.json_:
            print(summary.model_dump_json(), flush=True)
    except KeyboardInterrupt:
        print("error: interrupted; run again to go on from the last epoch", file=sys.stderr)
        return 130
    except ForRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, StageError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
