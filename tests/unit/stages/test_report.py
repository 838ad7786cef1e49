"""What is printed of an index: tables that no pipe breaks, lines that stay lines, JSON that is read back."""

from __future__ import annotations

import datetime
import io
import json
import subprocess
import sys
from itertools import count

import pytest

from for_ray.schema import Cause, Segment, Snapshot
from for_ray.stages.report import print_problems, print_quarantine, print_snapshots

ODD = "s3://b/[red]a\nb\t\x1b[31m :smile: #?%2F ключ"
SHOWN = r"s3://b/[red]a\nb\t\x1b[31m :smile: #?%2F ключ"


def make_snapshot(number: int, **changes) -> Snapshot:
    segment = Segment(
        segment_id="s",
        codec_id="c",
        file_name="segment-s.faiss",
        sha256="",
        num_bytes=6_000_000_000,
        num_vectors=4,
        first_image_id=0,
        end_image_id=9,
    )
    snapshot = Snapshot(
        snapshot_id=number,
        created_at=datetime.datetime(2026, 11, number, 3, 4, 5, 678, tzinfo=datetime.UTC),
        fingerprint="0123456789abcdef",
        images_version=7,
        codec=None,
        segments=[segment, segment],
        deleted_image_ids=[],
        nprobe=4,
        listed=20_000_001,
        indexed=19_999_990,
        quarantined=11,
        num_vectors=240_000_000,
        recall_at_50=0.96342,
    )
    return snapshot.model_copy(update=changes)


def printed(write, *args, **kwargs) -> list[str]:
    stream = io.StringIO()
    write(*args, stream=stream, **kwargs)
    return stream.getvalue().splitlines()


def test_snapshots_are_a_line_each_and_the_current_one_is_marked():
    newest = make_snapshot(12, restores=9, recall_at_50=None, segments=[], quarantined=0)
    lines = printed(print_snapshots, [newest, make_snapshot(9)], json=False)
    assert [" ".join(line.split()) for line in lines] == [
        "snapshot published encoder indexed quarantined vectors segments size recall",
        "12 2026-11-12 03:04:05Z 0123456789ab 19,999,990 0 240,000,000 0 0 B – current, repeats 9",
        "9 2026-11-09 03:04:05Z 0123456789ab 19,999,990 11 240,000,000 2 12 GB 0.963",
    ]
    assert len({line.index("0123456789ab") for line in lines[1:]}) == 1


def test_snapshots_as_json_are_an_object_a_line():
    lines = printed(print_snapshots, [make_snapshot(12, restores=9), make_snapshot(9)], json=True)
    assert [json.loads(line)["snapshot"] for line in lines] == [12, 9]
    assert json.loads(lines[0]) == {
        "snapshot": 12,
        "created_at": "2026-11-12T03:04:05.000678+00:00",
        "fingerprint": "0123456789abcdef",
        "listed": 20_000_001,
        "indexed": 19_999_990,
        "quarantined": 11,
        "vectors": 240_000_000,
        "segments": 2,
        "bytes": 12_000_000_000,
        "recall_at_50": 0.96342,
        "restores": 9,
    }


def test_without_anything_a_person_is_told_and_a_machine_reads_nothing():
    assert printed(print_snapshots, [], json=False) == ["no snapshot was published yet"]
    assert printed(print_quarantine, [], [], json=False) == ["no image is quarantined"]
    assert printed(print_problems, []) == []
    for write in (print_snapshots, print_problems):
        assert printed(write, [], json=True) == []
    assert printed(print_quarantine, [], [], json=True) == []


def test_the_quarantine_is_a_table_of_causes_then_every_image_in_one_line():
    causes = [
        Cause(cause="not an image: [b]HTML[/b]" + " very" * 60, count=1200),
        Cause(cause="empty", count=1),
    ]
    lines = printed(print_quarantine, causes, [(ODD, "no\nimage"), ("/a b", "empty")], json=False)
    assert [line.split() for line in lines[:3]] == [
        ["images", "cause"],
        ["1,200", *causes[0].cause.split()],
        ["1", "empty"],
    ]
    assert lines[3:] == ["", rf"{SHOWN} → no\nimage", "/a b → empty"]


def test_the_quarantine_as_json_holds_names_as_they_are():
    lines = printed(print_quarantine, [], [(ODD, "no\nimage"), ("/\udcff", "empty")], json=True)
    assert all(line.isascii() for line in lines)
    assert [json.loads(line) for line in lines] == [
        {"uri": ODD, "error": "no\nimage"},
        {"uri": "/\udcff", "error": "empty"},
    ]


class FullError(Exception):
    """The reader has gone away."""


class Narrow(io.StringIO):
    """Takes ten lines."""

    def write(self, text: str) -> int:
        if self.getvalue().count("\n") >= 10:
            raise FullError
        return super().write(text)


@pytest.mark.parametrize("as_json", [True, False])
def test_images_are_printed_as_they_come(as_json):
    endless = ((f"/{number}", "empty") for number in count())
    with pytest.raises(FullError):
        print_quarantine([Cause(cause="empty", count=1)], endless, json=as_json, stream=Narrow())
    assert next(endless)[0] in {"/7", "/8", "/11"}


def test_whoever_reads_may_stop_early():
    script = (
        "from for_ray.stages.report import print_problems; import itertools;"
        "print_problems(str(number) for number in itertools.islice(itertools.count(), 100_000))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 0


def test_a_limit_says_what_it_leaves_out():
    causes = [Cause(cause="empty", count=3)]
    rows = [(f"/{number}", "empty") for number in range(3)]
    lines = printed(print_quarantine, causes, rows, json=False, limit=2)
    assert lines[3:] == ["/0 → empty", "/1 → empty", "… of 3 images, 2 are shown"]
    assert printed(print_quarantine, causes, rows, json=False, limit=3)[-1] == "/2 → empty"
    assert len(printed(print_quarantine, causes, rows, json=True, limit=2)) == 2


def test_problems_are_a_line_each():
    assert printed(print_problems, ["a\nb", "[red]c"]) == [r"a\nb", "[red]c"]
    assert printed(print_problems, iter(["a\nb"]), json=True) == [r'{"problem": "a\nb"}']


def test_lists_go_to_stdout(capsys):
    print_problems(["it is wrong"])
    assert capsys.readouterr() == ("it is wrong\n", "")
