"""The report on pseudo-labels holds the numbers that it was made of."""

from __future__ import annotations

import numpy as np

from for_ray.reports.labels import CategoryCounts, GroupQuality, LabelFindings, label_page
from for_ray.reports.page import Picture, Tag
from for_ray.schema import LabelRun

RUN = LabelRun(
    dataset="coco val",
    images_uri="s3://b/val",
    encoder="RN50x64",
    fingerprint="ab" * 8,
    backbone_fingerprint="cd" * 8,
    text_fingerprint="ef" * 8,
    head="cluster",
    num_slots=50,
    vocabulary="imagenet21k",
    vocabulary_sha256="0" * 64,
    num_names=3,
    exclude_novel=True,
    dropped_names=("cat", "kitty <b>"),
    threshold=5e-4,
    num_labels=50,
    logit_scale=100.0,
    has_features=True,
    num_prefix=1,
    height=14,
    width=14,
    channels=4096,
)


def findings(**changes: object) -> LabelFindings:
    given = {
        "counts": [("images of the data set", 12), ("missing in the store", 2)],
        "names": ["dog", "kite", "sofa"],
        "images_of_name": np.array([3, 0, 7]),
        "images_with": np.array([1, 8, 1, 0]),
        "groups": [GroupQuality("base", 48, 40, 0.25, 0.5), GroupQuality("novel", 17, 16, None, 0.125)],
        "categories": [
            CategoryCounts("rarely", "novel", shown=2, found=0, right=0),
            CategoryCounts("often", "base", shown=8, found=4, right=3),
        ],
        "pictures": [Picture("a.jpg", [Tag("dog", 0.75, "good")])],
    }
    return LabelFindings(**{**given, **changes})


def test_the_report_tells_counts_quality_and_settings():
    html = label_page(RUN, findings(), made_at="2026-01-02 03:04 UTC")
    for text in (
        "coco val",
        "RN50x64",
        "2026-01-02 03:04 UTC",
        "0.25",
        "0.125",
        "1 + 14 × 14 tokens of 4096",
    ):
        assert text in html
    assert "2 of 3 names are the label of some image." in html
    assert "cat, kitty &lt;b&gt;" in html
    assert html.index(">sofa<") < html.index(">dog<", html.index("most frequent labels"))
    assert ">kite<" not in html
    often, rarely = html.index("<td>often</td>"), html.index("<td>rarely</td>")
    assert often < rarely
    row = html[often : html.index("</tr>", often)]
    assert [part.split("</td>")[0] for part in row.split('<td class="number">')[1:]] == [
        *("8", "4", "3", "0.75", "0.375")
    ]


def test_a_report_on_nothing_is_still_a_report():
    empty = findings(
        images_of_name=np.zeros(3, int), images_with=np.zeros(4, int), groups=[], categories=[], pictures=[]
    )
    html = label_page(RUN.model_copy(update={"exclude_novel": False}), empty, made_at="now")
    assert html.count("no values") == 2
    assert "By category" not in html
    assert "The names of novel categories were left in." in html
