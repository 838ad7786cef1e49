"""The report on a table of pseudo-labels: what was found, how often, how well, and what it looks like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from for_ray.reports.charts import bar_chart, histogram
from for_ray.reports.page import Chart, Facts, Gallery, Picture, Section, Table, render_page
from for_ray.schema import LabelRun

MOST_NAMES = 40
"""Names in the chart of the most frequent ones."""

MOST_CATEGORIES = 100
"""Rows of the table of categories: those that most images show."""

MOST_DROPPED = 200


@dataclass(frozen=True)
class GroupQuality:
    """Pseudo-labels against the truth, over all pairs of an image and a category of one group.

    Attributes:
        group: `base` or `novel`.
        num_categories: In it.
        num_named: Those that some name of the vocabulary means; the others cannot be found.
        precision: Right ones among those found; None where nothing was found.
        recall: Right ones among those shown, of named categories; None where nothing was shown.
    """

    group: str
    num_categories: int
    num_named: int
    precision: float | None
    recall: float | None


@dataclass(frozen=True)
class CategoryCounts:
    """Images of one category of the data set.

    Attributes:
        name: The category.
        group: `base` or `novel`.
        shown: Images that show it.
        found: Images with a pseudo-label that means it.
        right: Both.
    """

    name: str
    group: str
    shown: int
    found: int
    right: int


@dataclass(frozen=True)
class LabelFindings:
    """What a report is made of.

    Attributes:
        counts: Names and numbers, such as images that are missing.
        names: The vocabulary [V].
        images_of_name: How many images have the label [V].
        images_with: How many images have 0, 1, 2 … labels.
        groups: How good labels are, where the truth is known.
        categories: Counts of those that the vocabulary names.
        pictures: Some images with their labels.
    """

    counts: Sequence[tuple[str, object]]
    names: Sequence[str]
    images_of_name: NDArray[np.int64]
    images_with: NDArray[np.int64]
    groups: Sequence[GroupQuality]
    categories: Sequence[CategoryCounts]
    pictures: Sequence[Picture]


def label_page(run: LabelRun, found: LabelFindings, *, made_at: str) -> str:
    """The report as HTML.

    Args:
        run: What the labels were made with.
        found: What they are.
        made_at: When, for people.
    """
    subtitle = f"{run.dataset} · {run.encoder}, head {run.head} · {run.vocabulary} · {made_at}"
    sections: list[Section] = [
        Facts("What there is", found.counts),
        _groups(found.groups),
        _pictures(found.pictures),
        _frequent(found),
        Chart(
            "Labels of an image",
            histogram(found.images_with.tolist(), x_label="labels of an image", y_label="images"),
            note=f"At most {run.num_labels}, each with a probability above {run.threshold:g}.",
        ),
        *_categories(found.categories),
        Facts("Settings", _settings(run), note=_dropped(run)),
    ]
    return render_page("Pseudo-labels", subtitle=subtitle, sections=sections)


def _groups(groups: Sequence[GroupQuality]) -> Table:
    return Table(
        "Against the labels of the data set",
        ["categories", "in the group", "named", "precision", "recall"],
        [[each.group, each.num_categories, each.num_named, each.precision, each.recall] for each in groups],
        note="Over all pairs of an image and a category that some name of the vocabulary means. Where the "
        "data set does not label every category in every image, only the pairs that it judges count.",
    )


def _pictures(pictures: Sequence[Picture]) -> Gallery:
    return Gallery(
        "Some images",
        pictures,
        note="Chosen by chance. Each label with its probability, the most probable first. ✓: means a "
        "category that the image shows. ✗: means one that it does not show. Neither: not known.",
    )


def _frequent(found: LabelFindings) -> Chart:
    order = np.argsort(-found.images_of_name, kind="stable")[:MOST_NAMES]
    order = order[found.images_of_name[order] > 0]
    used = int(np.count_nonzero(found.images_of_name))
    return Chart(
        "The most frequent labels",
        bar_chart(
            [found.names[index] for index in order],
            found.images_of_name[order].tolist(),
            value_label="images",
        ),
        note=f"{used:,} of {len(found.names):,} names are the label of some image.",
    )


def _categories(categories: Sequence[CategoryCounts]) -> list[Section]:
    if not categories:
        return []
    rows = sorted(categories, key=lambda each: (-each.shown, each.name))[:MOST_CATEGORIES]
    header = ["category", "group", "images", "found", "right", "precision", "recall"]
    values = [
        [
            *(each.name, each.group, each.shown, each.found, each.right),
            each.right / each.found if each.found else None,
            each.right / each.shown if each.shown else None,
        ]
        for each in rows
    ]
    shown = f"The {len(rows)} of {len(categories)} named categories that most images show."
    return [Table("By category", header, values, note=shown)]


def _settings(run: LabelRun) -> list[tuple[str, object]]:
    grid = f"{run.num_prefix} + {run.height} × {run.width} tokens of {run.channels}"
    return [
        ("images", run.images_uri),
        ("encoder", f"{run.encoder} ({run.fingerprint})"),
        ("head", f"{run.head}, {run.num_slots} slots"),
        ("vocabulary", f"{run.vocabulary}, {run.num_names:,} names"),
        ("logit scale", run.logit_scale),
        ("threshold", run.threshold),
        ("labels of an image, at most", run.num_labels),
        ("features", f"{grid}, float16" if run.has_features else "not stored"),
    ]


def _dropped(run: LabelRun) -> str:
    if not run.exclude_novel:
        return "The names of novel categories were left in."
    names = ", ".join(run.dropped_names[:MOST_DROPPED]) or "none"
    more = len(run.dropped_names) - MOST_DROPPED
    return f"Left out, since they mean a novel category: {names}" + (f" and {more} more" if more > 0 else "")
