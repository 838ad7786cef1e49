"""The page about a run: what it says holds for runs that went well, badly, or nowhere."""

from __future__ import annotations

import datetime
import re
from html.parser import HTMLParser

import pytest

from for_ray.reports.nightly import MOST_CAUSES, bound_by, render_nightly
from for_ray.schema import Cause, GrowthPoint, RunReport, StageTime, WorkTime

STARTED_AT = datetime.datetime(2026, 11, 25, 3, 0, 12, tzinfo=datetime.UTC)


class Page(HTMLParser):
    """Text of a page: all of it, the rows of its tables, and what stands in each section."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words, self.rows, self.sections = "", [], {}
        self.tags: set[str] = set()
        self._section: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "section":
            self._section = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag == "section":
            self.sections[self._section[0] if self._section else ""] = " ".join(self._section[1:])

    def handle_data(self, text):
        if text.strip() and self.lasttag not in ("style", "title"):
            self.words += f" {text.strip()}"
            self._section.append(text.strip())
            if self.rows and self.rows[-1] and self.lasttag in ("td", "th", "br"):
                self.rows[-1][-1] = f"{self.rows[-1][-1]} {text.strip()}".strip()

    def facts(self) -> dict[str, str]:
        return {row[0]: row[1] for row in self.rows if len(row) == 2}


def growth(num_points: int) -> tuple[GrowthPoint, ...]:
    return tuple(
        GrowthPoint(
            snapshot_id=number,
            created_at=STARTED_AT + datetime.timedelta(days=number),
            indexed=1000 * number,
            quarantined=number,
            num_vectors=4000 * number,
            num_segments=1,
            num_bytes=3_000_000 * number,
        )
        for number in range(1, num_points + 1)
    )


def make_report(**changes) -> RunReport:
    report = RunReport(
        run_id="a1b2c3d4",
        started_at=STARTED_AT,
        seconds=100.0,
        outcome="published",
        message="published snapshot 3",
        images_uri="s3://bucket/images",
        index_uri="s3://bucket/index",
        encoder="picturebook, sum",
        fingerprint="0123456789abcdef",
        snapshot_id=3,
        listed=3003,
        new=1000,
        changed=12,
        gone=7,
        unchanged=1991,
        skipped=2,
        indexed=3000,
        quarantined=3,
        num_vectors=9000,
        dead_vectors=1000,
        num_segments=2,
        segment_bytes=940_000,
        codec="IVF64,RaBitQ4",
        nprobe=8,
        recall_at_50=0.9634,
        images_per_second=25.3,
        stages=(
            StageTime(name="list", seconds=10.0, done=3003),
            StageTime(name="encode", seconds=40.0, done=1012),
            StageTime(name="build", seconds=20.0, done=1, unit="segments"),
        ),
        work=WorkTime(read_seconds=60.0, wait_seconds=45.0, encode_seconds=30.0, num_actors=2, has_gpus=True),
        causes=(Cause(cause="the file ends too early", count=3, examples=("s3://bucket/images/a.jpg",)),),
        growth=growth(3),
    )
    return report.model_copy(update=changes)


def test_the_page_says_what_came_of_the_run():
    page = Page(render_nightly(make_report()))
    assert page.words.startswith(" Published snapshot 3 s3://bucket/index · 2026-11-25 03:00 UTC")
    assert "1 min 40 s" in page.words
    facts = page.facts()
    assert facts["new"] == "1,000"
    assert facts["gone"] == "7"
    assert facts["dead vectors, of gone images"] == "1,000 (10.0%)"
    assert facts["a vector takes"] == "94 B"
    assert facts["size of the segments"] == "940 kB"
    assert facts["recall at 50"] == "0.963"
    assert facts["lists searched (nprobe)"] == "8"
    assert facts["actors waited"] == "45.0 s (60% of the actors' time)"
    assert facts["encoder"] == "picturebook, sum (0123456789abcdef)"
    assert bound_by(make_report()) in page.sections["What bound the run"]


def test_stages_have_their_share_of_the_run_and_their_rate_also_when_one_ran_twice():
    again = StageTime(name="list", seconds=5.0)
    page = Page(render_nightly(make_report(stages=(*make_report().stages, again))))
    rows = [row for row in page.rows if len(row) == 6]
    assert rows == [
        ["stage", "seconds", "% of the run", "done", "", "a second"],
        ["list", "10", "10", "3,003", "images", "300.3"],
        ["encode", "40", "40", "1,012", "images", "25.3"],
        ["build", "20", "20", "1", "segments", "0.05"],
        ["list", "5", "5", "–", "", "–"],
        ["between stages", "25", "25", "–", "", "–"],
    ]
    drawn = page.sections["Seconds by stage"].split()
    assert [drawn.count(name) for name in ("list", "encode", "build", "between")] == [2, 1, 1, 1]


def work(**changes) -> WorkTime:
    return WorkTime(encode_seconds=40.0, wait_seconds=40.0, num_actors=2, has_gpus=True).model_copy(
        update=changes
    )


@pytest.mark.parametrize(
    ("work", "sentence"),
    [
        (work(), "In it, encoding: the actors waited for 50% of their time. More GPUs help"),
        (work(has_gpus=False), "GPUs help, or more CPU nodes, as far as --max-actors lets them."),
        (
            work(wait_seconds=41.0, read_seconds=1.0),
            "In it, reading: the actors waited for 51% of their time.",
        ),
        (work(wait_seconds=60.0, read_seconds=8.0), "More CPU nodes help, or more threads (--read-threads)."),
        (
            work(wait_seconds=60.0, read_seconds=8.0, write_seconds=9.0),
            "In it, writing: the actors waited for 60%",
        ),
        (
            work(wait_seconds=0.0, encode_seconds=10.0),
            "the start of the actors: of up to 2, 0.2 were ready on average.",
        ),
        (work(wait_seconds=0.0, encode_seconds=0.0), "What its workers did is not known."),
        (None, "What its workers did is not known."),
    ],
)
def test_within_the_encode_stage_the_scarce_thing_is_named(work, sentence):
    said = bound_by(make_report(work=work))
    assert said.startswith("The stage encode, with 40.0 s of 1 min 40 s (40%). ")
    assert sentence in said


def test_a_stage_counts_as_often_as_it_ran():
    stages = make_report().stages
    said = bound_by(make_report(stages=(*stages, stages[2], stages[2])))
    assert said.startswith("The stage build, with 1 min 00 s of 1 min 40 s (60%). ")
    assert "more CPUs in the cluster help" in said


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"stages": ()}, "Not known: no stage was timed."),
        (
            {"stages": (StageTime(name="list", seconds=0.0),), "seconds": 0.0},
            "Not known: no stage was timed.",
        ),
        (
            {"stages": (StageTime(name="list", seconds=1.0),), "seconds": 4.0},
            "No stage: 3.0 s of 4.0 s (75%)",
        ),
        (
            {"stages": (StageTime(name="sweep", seconds=2.0),), "seconds": 0.0},
            "sweep, with 2.0 s of 2.0 s (100%).",
        ),
    ],
)
def test_what_bound_a_run_of_which_little_is_known(changes, sentence):
    assert sentence in bound_by(make_report(**changes))


def test_a_run_that_failed_at_once_claims_nothing():
    report = RunReport(
        run_id="a1",
        started_at=STARTED_AT,
        seconds=0.0,
        outcome="failed",
        message="list: s3://bucket/x can't be listed; check the uri",
        images_uri="s3://bucket/x",
        index_uri="s3://bucket/index",
        encoder="picturebook",
        fingerprint="ab",
    )
    page = Page(render_nightly(report))
    assert page.words.startswith(" The run failed ")
    assert "list: s3://bucket/x can't be listed; check the uri" in page.words
    assert page.sections["Images of the bucket"] == "Not known: the run failed before it had compared them."
    assert page.sections["What searches see"] == "Nothing: no snapshot was ever published."
    assert page.sections["What bound the run"] == "Not known: no stage was timed."
    assert page.sections["Quarantine"] == "Not known."
    assert page.sections["Growth"] == "It shows from the second snapshot on."
    assert set(page.facts()) == {"run", "images", "index", "encoder"}
    assert "svg" not in page.tags
    listed = Page(render_nightly(report.model_copy(update={"listed": 1234})))
    assert listed.sections["Images of the bucket"].endswith("compared them; it had listed 1,234.")


def test_a_run_that_failed_late_shows_what_it_knew_and_what_searches_still_see():
    causes = (Cause(cause="the file is empty", count=40),)
    page = Page(render_nightly(make_report(outcome="failed", message="encode: too many", causes=causes)))
    assert page.words.startswith(" The run failed")
    assert page.facts()["snapshot"] == "3"
    assert page.facts()["new"] == "1,000"
    quarantine = page.sections["Quarantine: 40 images that could not be read"]
    assert "Of the table as it is now; the snapshot has 3 of them." in quarantine


def test_nothing_changed_and_nothing_to_find():
    page = Page(
        render_nightly(
            make_report(
                outcome="unchanged",
                message="nothing changed; snapshot 3 stays",
                work=None,
                causes=(),
                **dict.fromkeys(("listed", "new", "changed", "gone", "unchanged", "skipped"), 0),
                **dict.fromkeys(("indexed", "quarantined", "num_vectors", "dead_vectors"), 0),
                **dict.fromkeys(("num_segments", "segment_bytes"), 0),
                codec=None,
                recall_at_50=None,
                growth=tuple(point.model_copy(update={"num_bytes": 0, "indexed": 0}) for point in growth(2)),
            )
        )
    )
    assert page.words.startswith(" Nothing changed")
    facts = page.facts()
    assert facts["listed"] == "0"
    assert facts["dead vectors, of gone images"] == "0"
    assert [facts[name] for name in ("a vector takes", "codec", "recall at 50")] == ["–"] * 3
    assert "Inside the encode stage" not in page.sections
    assert page.sections["Quarantine"] == "No image is quarantined."


def test_causes_come_with_examples_whatever_is_in_their_names():
    examples = (
        "s3://b/<script>alert(1)</script>",
        "s3://b/two\nlines\x1b[31m",
        "s3://b/\u202egpj.exe",
        "s3://b/ключ",
    )
    causes = (
        Cause(cause="not an image: <b>HTML</b>", count=9, examples=examples),
        *(Cause(cause=f"cause {number}", count=1) for number in range(MOST_CAUSES + 1)),
    )
    html = render_nightly(make_report(causes=causes, quarantined=9 + MOST_CAUSES + 1, message="two\nlines"))
    page = Page(html)
    assert "script" not in page.tags
    assert "b" not in page.tags
    row = next(row for row in page.rows if row[0] == "not an image: <b>HTML</b>")
    assert row[1:3] == ["9", "15"]
    assert (
        row[3]
        == r"s3://b/<script>alert(1)</script> s3://b/two\nlines\x1b[31m s3://b/\u202egpj.exe s3://b/ключ"
    )
    assert sum(row[0].startswith("cause ") for row in page.rows) == MOST_CAUSES - 1
    assert "2 more causes hold for 2 images." in page.words
    assert r"two\nlines" in page.words
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", html)


def test_growth_is_drawn_from_the_second_snapshot_on():
    page = Page(render_nightly(make_report()))
    names = ["images indexed", "images quarantined", "vectors", "size of the segments"]
    assert [name for name in page.sections if name.startswith("Growth")] == [
        f"Growth: {name}" for name in names
    ]
    assert "MB" in page.sections["Growth: size of the segments"].split()
    assert "The last 3 snapshots" in page.sections["Growth: vectors"]
    alone = Page(render_nightly(make_report(growth=growth(1))))
    assert [name for name in alone.sections if name.startswith("Growth")] == ["Growth"]
