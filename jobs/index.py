"""Keep an index of a folder or bucket of images up to date; `--help` lists the settings.

python jobs/index.py --images s3://bucket/images --index s3://bucket/index
python jobs/index.py --plan-vectors 1e9
python jobs/index.py --index s3://bucket/index --list-snapshots | --rollback 12 | --verify | --show-quarantine
ray job submit --working-dir . -- python jobs/index.py --images … --index …
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("for_ray") is None:  # a copy that is not installed, as `ray job submit` makes it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from for_ray.command import run_command
from for_ray.config import IndexSettings, read_settings


def main(arguments: list[str]) -> int:
    """Run the job; its exit code."""
    return run_command(lambda: _run(arguments), advice="run again to go on: what was committed stays")


def _run(arguments: list[str]) -> None:
    settings = read_settings(IndexSettings, arguments)

    if settings.plan_vectors is not None:
        from for_ray.pipeline.capacity import run_plan
        from for_ray.stages.plan_report import print_plan

        print_plan(run_plan(settings), json=settings.json_)
        return

    from for_ray.stages.progress import Progress

    if settings.upkeep:
        from for_ray.pipeline.upkeep import run_upkeep

        run_upkeep(settings, progress=Progress())
        return

    from for_ray.pipeline.index import run_index
    from for_ray.stages.report import print_summary

    summary = run_index(settings, progress=Progress())
    print_summary(summary)
    if settings.json_:
        print(summary.model_dump_json(), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
