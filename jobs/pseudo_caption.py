"""Give images the nearest of many captions, for `jobs/finetune.py --recipe mcip`; see `--help`.

python jobs/pseudo_caption.py --dataset folder:s3://bucket/things --captions s3://bucket/cc12m.tsv \
                              --encoder open_clip:ViT-L-14-336@openai --output s3://bucket/captions
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("for_ray") is None:  # a copy that is not installed, as `ray job submit` makes it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from for_ray.command import run_command
from for_ray.config import PseudoCaptionSettings, read_settings


def main(arguments: list[str]) -> int:
    """Run the job; its exit code."""
    return run_command(lambda: _run(arguments))


def _run(arguments: list[str]) -> None:
    settings = read_settings(PseudoCaptionSettings, arguments)

    from for_ray.pipeline.pseudo_caption import run_pseudo_caption
    from for_ray.stages.progress import Progress

    progress = Progress()
    run = run_pseudo_caption(settings, progress=progress)
    progress.say(run.describe())
    if settings.json_:
        print(run.model_dump_json(), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
