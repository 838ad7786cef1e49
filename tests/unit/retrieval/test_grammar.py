"""Questions are read as the grammar says, and what is none of it gets a caret under the spot."""

import itertools
import pickle
import re
from pathlib import Path

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from for_ray.errors import ConfigError
from for_ray.retrieval import grammar
from for_ray.retrieval.grammar import QuestionError, parse


@pytest.mark.parametrize(
    ("question", "names", "clauses"),
    [
        ("  a\tred  car ", ["a red car"], [([0], [])]),
        ("salt and pepper", ["salt and pepper"], [([0], [])]),
        ("a dog AND a frisbee", ["a dog", "a frisbee"], [([0, 1], [])]),
        ("a dog AND a dog", ["a dog"], [([0, 0], [])]),
        ("a street NOT a car", ["a street", "a car"], [([0], [1])]),
        ("a street AND NOT a car", ["a street", "a car"], [([0], [1])]),
        ("NOT a car AND a street", ["a car", "a street"], [([1], [0])]),
        ("NOT NOT a car", ["a car"], [([0], [])]),
        ("a OR b AND c", ["a", "b", "c"], [([0], []), ([1, 2], [])]),
        ("(a OR b) AND c", ["a", "b", "c"], [([0, 2], []), ([1, 2], [])]),
        ("a NOT (b OR c)", ["a", "b", "c"], [([0], [1, 2])]),
        ("a NOT (b AND c)", ["a", "b", "c"], [([0], [1]), ([0], [2])]),
        ("a NOT (b NOT c)", ["a", "b", "c"], [([0], [1]), ([0, 2], [])]),
        ("(a OR b) NOT a", ["a", "b"], [([1], [0])]),
        ("a NOT b NOT b", ["a", "b"], [([0], [1])]),
        ('"salt AND pepper" AND a', ["salt AND pepper", "a"], [([0, 1], [])]),
        ('"a (big)  dog"', ["a (big) dog"], [([0], [])]),
        ("“eine Straße”NOT雪", ["eine Straße", "NOT雪"], None),
        ("((a))", ["a"], [([0], [])]),
    ],
)
def test_clauses(question: str, names: list[str], clauses: list[tuple[list[int], list[int]]] | None) -> None:
    if clauses is None:
        with pytest.raises(QuestionError, match="before 'NOT雪'"):
            parse(question)
        return
    found = parse(question)
    assert list(found.names) == names
    assert [(list(wanted), list(unwanted)) for wanted, unwanted in found.clauses] == clauses


@pytest.mark.parametrize(
    ("question", "position", "words"),
    [
        ("a dog AND", 9, "expected a name after AND, found the end"),
        ("AND a dog", 0, "expected a name, found AND; a name that is AND goes in quotation marks"),
        ("a dog AND OR a cat", 10, "expected a name after AND, found OR"),
        ("a dog (small)", 6, "expected AND, OR, NOT or the end before ("),
        ('a "b" c', 2, "before 'b'"),
        ("(a OR b", 0, "never closed: add )"),
        ("a OR b)", 6, "never opened"),
        ("()", 1, "expected a name after (, found )"),
        ('a AND "b', 6, "quotation mark is never closed"),
        ('a AND ""', 6, "the name in quotation marks is empty"),
        ("NOT a dog", 4, "only says what an image must not show"),
        ("a dog OR NOT a cat", 13, "only says what an image must not show"),
        ("NOT (a OR b)", 5, "only says what an image must not show"),
        ("a dog NOT a dog", 10, "no image shows 'a dog' and does not show it"),
        (" OR ".join("abcdefghi"), 40, "more than 8 names"),
        ("(" * 30 + "a", 21, "more than 20 parentheses"),
    ],
)
def test_caret_stands_under_the_spot(question: str, position: int, words: str) -> None:
    with pytest.raises(QuestionError) as refused:
        parse(question)
    assert refused.value.position == position
    said, shown, caret = str(refused.value).split("\n")
    assert words in said
    assert shown == "  " + question
    assert caret == " " * (position + 2) + "^"
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)


@pytest.mark.parametrize(("question", "words"), [("", "empty"), (" \n", "empty"), ("x" * 10_000, "10,000")])
def test_nothing_and_too_much_are_one_line(question: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(question)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_caret_in_a_long_line_and_under_wide_letters() -> None:
    with pytest.raises(QuestionError) as refused:
        parse("x " * 200 + "AND AND " + "y " * 100)
    _, shown, caret = str(refused.value).split("\n")
    assert len(shown) < 80
    assert shown[len(caret) - 1 :].startswith("AND y")
    assert shown[: len(caret) - 1].endswith("AND ")
    with pytest.raises(QuestionError) as refused:
        parse("犬\tAND\x07 )")
    _, shown, caret = str(refused.value).split("\n")
    assert shown == "  犬 AND  )"
    assert caret == " " * 10 + "^"


WORDS = st.sampled_from(["a", "b", "AND", "OR", "NOT", "(", ")", '"c d"', '"', "\n", "é"])


@given(st.lists(WORDS, max_size=14).map(" ".join))
def test_all_that_parses_means_what_python_makes_of_it(question: str) -> None:
    """Against Python's own `and`, `or`, `not`, over all truths; a name is there or it isn't."""
    try:
        found = parse(question)
    except QuestionError as error:
        event(error.reason.split(":")[0][:30])
        return
    python = _as_python(question)
    for values in itertools.product([False, True], repeat=len(found.names)):
        truth = dict(zip(found.names, values, strict=True))
        said = any(
            all(values[name] for name in wanted) and not any(values[name] for name in unwanted)
            for wanted, unwanted in found.clauses
        )
        assert said == eval(python, {"truth": truth})


def _as_python(question: str) -> str:
    """The question with names as look-ups; two parts side by side are only ever joined by a NOT."""
    parts: list[str] = []
    for token in grammar._tokens(question):
        if token.kind == "NOT" and parts and parts[-1] not in {"(", "and", "or", "not"}:
            parts.append("and")
        if token.kind == "name":
            parts.append(f"truth[{token.text!r}]")
        elif token.kind != "end":
            parts.append(token.kind.lower())
    return " ".join(parts)


def test_the_page_shows_what_parses() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "questions.md").read_text("utf-8")
    [block] = re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    questions = [re.split(r" {2,}", line)[0] for line in block.splitlines()]
    assert len(questions) == 8
    assert [len(parse(question).clauses) for question in questions] == [1, 1, 1, 1, 2, 2, 1, 1]
    [refused] = re.findall(r"^    error: (.*\n.*\n.*\^)$", page, re.MULTILINE)
    with pytest.raises(QuestionError) as error:
        parse("a dog AND")
    assert str(error.value) == refused.replace("\n    ", "\n")
    for figure in (grammar.MAX_LETTERS, grammar.MAX_NAMES):
        assert f"{figure:,} " in page
