"""Filters of clients: comparisons pass, what could fill the memory does not, however it is written."""

import pytest

from for_ray.errors import ConfigError
from for_ray.serving.conditions import check_condition


@pytest.mark.parametrize(
    "where",
    [
        "camera = 2",
        "split = 'val' AND (camera = 2 OR camera IN (3, 4))",
        "NOT (width > 100) and lower(uri) like '%cat%'",
        "regexp_like(uri, '^/a/[0-9]+(x|y)\\.jpg$')",
        "CAST(size_bytes AS DECIMAL(10, 2)) BETWEEN (1) AND (2)",
        "note = 'repeat(x, 3) -- it''s $5 /* here */'",
        '"a column (" = 1',
        "`repeat` = 2 and (width) > 3",
        "encoded_at > timestamp '2026-01-01'",
        "price_repeat > 3",
        "-1.5e-3 + width * 2 / 3 % 4 != tags[1] and a.b <> 2 and height <= 1 and width >= 2 or x < 3",
        "note = 'a || b ? :c'",
        f"camera IN ({', '.join('1' * 90)})",
    ],
)
def test_conditions_that_pass(where: str) -> None:
    assert check_condition(where) == where


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("repeat(uri, 90000000) = 'x'", "function repeat is not"),
        ("REPEAT (uri, 9) = 'x'", "function REPEAT is not"),
        ("width = 1 or length(lpad(uri, 2000000000)) = 1", "function lpad"),
        ("array_length(range(1, 1000000000)) > 1", "function range"),
        ("repeat\n(uri, 9) = 'x'", "function repeat"),
        ("repeat/**/(uri, 9) = 'x'", "'/\\*' outside"),
        ("repeat--\n(uri, 9) = 'x'", "'--' outside"),
        ("`repeat`(uri, 9) = 'x'", "function `repeat`"),
        ("\"repeat\" (uri, 9) = 'x'", 'function "repeat"'),
        ("note = 'it''s' or repeat(uri, 9) = 'x'", "function repeat"),
        ("note = \"it's\" or repeat(uri, 9) = 'x'", "function repeat"),
        ("note = '\\' or repeat(uri, 9) = 'x'", "function repeat"),
        ("note = E'\\'' or repeat(uri, 9) = '\\''", "'E' right before a string"),
        ("note = $$'$$ or repeat(uri, 9) = '$$'$$'", "'\\$' outside"),
        ("a.repeat(uri, 9) = 'x'", "function repeat"),
        ("répéter(uri) = 'x'", "function répéter"),
        ("replace(uri, 'a', 'bb') = 'x'", "function replace"),
        ("uri||uri = 'x'", "'\\|' outside"),
        ("uri | | uri = 'x'", "'\\|' outside"),
        ("width = ?", "'\\?' outside"),
        ("width = :x", "':' outside"),
        ("width = @x", "'@' outside"),
        ("width::int = 1", "':' outside"),
        ("width = 1; drop", "';' outside"),
        ("width = 1 \\ 2", "outside"),
        ("width ^ 2 = 1 # x", "'\\^' outside"),
        ("uri ~ 'x'", "'~' outside"),
        ("width ! 1", "'!' outside"),
        ("note = 'it", "' that is never closed"),
        ("width" + "+1" * 100 + " > 0", "more than 200 names"),
        ("NOT " * 300 + "width > 0", "more than 200 names"),
    ],
)
def test_conditions_that_do_not(where: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        check_condition(where)
    assert "\n" not in str(refused.value)


def test_long_conditions_are_read_at_once() -> None:
    for part in ("(", "a", "'", '"', "`", "a ", "a(", "-", "a'"):
        try:
            check_condition(part * (10_000 // len(part)))
        except ConfigError:
            continue
