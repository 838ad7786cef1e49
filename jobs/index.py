"""Keep an index of a folder or bucket of images up to date; `--help` lists the settings.

python jobs/index.py --images s3://bucket/images --index s3://bucket/index
ray job submit --working-dir . -- python jobs/index.py --images … --index …
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("for_ray") is None:  # a copy that is not installed, as `ray job submit` makes it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from for_ray.config import IndexSettings, read_settings
from for_ray.errors import ForRayError, StageError


def main(arguments: list[str]) -> int:
    """Run the job; its exit code."""
    try:
        settings = read_settings(IndexSettings, arguments)

        from for_ray.pipeline.index import run_index
        from for_ray.stages.progress import Progress
        from for_ray.stages.report import print_summary

        summary = run_index(settings, progress=Progress())
        print_summary(summary)
        if settings.json_:
            print(summary.model_dump_json(), flush=True)
    except KeyboardInterrupt:
        print("error: interrupted; run again to go on: what was committed stays", file=sys.stderr)
        return 130
    except ForRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, StageError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
