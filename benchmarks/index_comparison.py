"""Indexes of both sides of `index_build.py`: which of ours is as good as one of theirs, and the tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from for_ray.index.plan import DEFAULT_TARGET_RECALL

BY_HAND = "a quick key"
"""Of autofaiss's indexes the one that it did not choose."""

LEAST_RATIO = 5.0
SAME_RECALL = 0.001


def judge(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For each index of autofaiss, which of ours is built fastest of those no larger that find no less.

    Returns:
        `against`, re-ranked, and `against_codes_alone`: by autofaiss's index, what `_fastest` gives, None
        where none of ours does; `is_faster`, whether the first are all at least 5 times faster, of those
        that autofaiss chose and built in time.
    """
    ours = [line for line in lines if line["is_ours"] and "seconds" in line]
    theirs = [line for line in lines if not line["is_ours"] and "seconds" in line]
    against = {their["index"]: _fastest(their, ours, "_reranked") for their in theirs}
    chosen = [found for name, found in against.items() if not name.endswith(BY_HAND)]
    return {
        "against": against,
        "against_codes_alone": {their["index"]: _fastest(their, ours, "") for their in theirs},
        "is_faster": bool(chosen) and all(found and found["times_faster"] >= LEAST_RATIO for found in chosen),
    }


def _fastest(their: dict[str, Any], ours: Sequence[dict[str, Any]], suffix: str) -> dict[str, Any] | None:
    """Which, with what, how many times faster, and what a query takes it."""
    wanted = their["chosen"][f"recall{suffix}"] - SAME_RECALL
    found = []
    for line in ours:
        good = [each for each in _points(line) if each[f"recall{suffix}"] > wanted]
        if good and line["bytes"] <= their["bytes"]:
            point = min(good, key=lambda each: each[f"p50_ms{suffix}"])
            found.append(
                {
                    "index": line["index"],
                    "times_faster": their["seconds"] / line["seconds"],
                    "parameters": point["parameters"],
                    "recall": point[f"recall{suffix}"],
                    "p50_ms": point[f"p50_ms{suffix}"],
                    "their_recall": their["chosen"][f"recall{suffix}"],
                    "their_p50_ms": their["chosen"][f"p50_ms{suffix}"],
                }
            )
    return max(found, key=lambda each: each["times_faster"], default=None)


def _points(line: dict[str, Any]) -> list[dict[str, Any]]:
    return [line["chosen"], *line["curve"]]


def print_table(result: dict[str, Any]) -> None:
    """As Markdown, so that it can stand in README."""
    num_vectors, dim = result["shape"]
    print(f"\n{result['set']}: {num_vectors:,} vectors of {dim} dimensions\n")
    head = (
        "index",
        "codec",
        "build s",
        "CPU s",
        "peak MB",
        "bytes a vector",
        "recall@50, codes",
        "re-ranked",
        "query ms, codes",
        "re-ranked",
        f"at {DEFAULT_TARGET_RECALL}",
    )
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for line in result["lines"]:
        cells = _cells(line) if "seconds" in line else ["", f"not done after {line['not_done_after']} s"]
        print("| " + " | ".join([line["index"], *cells, *[""] * (len(head) - 1 - len(cells))]) + " |")
    for line in result["lines"]:
        if "versions" in line:
            print("\n" + ", ".join(f"{name} {number}" for name, number in line["versions"].items()) + "\n")
            break
    for title, against in (("re-ranked", result["against"]), ("codes alone", result["against_codes_alone"])):
        for name, found in against.items():
            print(f"{title}: {_said(name, found)}")


def _cells(line: dict[str, Any]) -> list[str]:
    chosen = line["chosen"]
    enough = [each for each in _points(line) if each["recall_reranked"] >= DEFAULT_TARGET_RECALL]
    fastest = min((each["p50_ms_reranked"] for each in enough), default=None)
    return [
        f"{line['codec']} ({line['parameters']})",
        *(f"{line[name]:,.0f}" for name in ("seconds", "cpu_seconds", "peak_mb", "bytes")),
        *(f"{chosen[name]:.3f}" for name in ("recall", "recall_reranked")),
        *(f"{chosen[name]:.2f}" for name in ("p50_ms", "p50_ms_reranked")),
        "–" if fastest is None else f"{fastest:.2f}",
    ]


def _said(name: str, found: dict[str, Any] | None) -> str:
    if found is None:
        return f"{name}: none of ours finds as much with no more bytes"
    return (
        f"{name}: {found['index']} is built {found['times_faster']:.1f} times faster; "
        f"{found['parameters']}: recall {found['recall']:.3f} against {found['their_recall']:.3f}, "
        f"{found['p50_ms']:.2f} ms a query against {found['their_p50_ms']:.2f}"
    )
