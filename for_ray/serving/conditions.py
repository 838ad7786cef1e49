"""Which SQL a client may filter with: comparisons, and functions whose answers don't grow out of hand.

Lance reads conditions alone, no statements; but some of its functions make gigabytes of a few letters
(`repeat`, `lpad`, `range`), and what then has no memory is the service.
"""

from __future__ import annotations

import re

from for_ray.errors import ConfigError

FUNCTIONS = frozenset({
    "abs", "array_contains", "array_has", "array_has_all", "array_has_any", "array_length", "btrim",
    "cardinality", "cast", "ceil", "char_length", "character_length", "coalesce", "contains", "date_part",
    "date_trunc", "ends_with", "exp", "extract", "floor", "greatest", "ilike", "isnan", "least", "left",
    "length", "ln", "log", "log10", "log2", "lower", "ltrim", "mod", "nullif", "octet_length", "position",
    "regexp_like", "regexp_match", "right", "round", "rtrim", "sign", "sqrt", "starts_with", "strpos",
    "substr", "substring", "to_date", "to_timestamp", "trim", "trunc", "try_cast", "upper",
})  # fmt: skip
"""What may stand before a parenthesis, with `_WORDS`."""

_WORDS = frozenset({
    "and", "between", "bigint", "case", "char", "date", "decimal", "else", "escape", "from", "in", "is",
    "like", "not", "numeric", "on", "or", "then", "time", "timestamp", "varchar", "when",
})  # fmt: skip
"""Of SQL itself, and types with a size."""

MAX_TOKENS = 200
"""Of a condition: names, values, operators, parentheses. Lance reads nested ones by recursion."""

_TOKEN = re.compile(
    r"""(?P<comment>--|/\*)
      | (?P<prefixed>\w+)(?=')
      | '[^']*'
      | (?P<quoted>"[^"]*"|`[^`]*`)(?P<quoted_call>\s*\()?
      | (?P<called>\w+)\s*\(
      | \w+
      | <>|!=|<=|>=|[-=<>+*/%(),.\[\]]
      | (?P<other>\S)""",
    re.VERBOSE,
)


def check_condition(where: str) -> str:
    """The condition, where a client may filter with it.

    Raises:
        ConfigError: It is too long, or has a comment, an operator that is not served (`||` makes texts longer
            and longer, `?` and `:name` stand for values that nobody gives), a string with a prefix, or a
            function that is not among `FUNCTIONS`.
    """
    for number, token in enumerate(_TOKEN.finditer(where)):
        if number == MAX_TOKENS:
            found = f"the filter has more than {MAX_TOKENS} names, values and operators"
            raise ConfigError(f"{found}: make it shorter, or give image ids")
        _check_token(token)
    return where


def _check_token(token: re.Match[str]) -> None:
    if token["other"] in {"'", '"', "`"}:
        raise ConfigError(f"the filter has a {token[0]} that is never closed: close it")
    if token["comment"] or token["other"]:
        raise ConfigError(f"the filter has a {token[0]!r} outside of a string: leave it out")
    if token["prefixed"]:
        raise ConfigError(f"the filter has {token[0]!r} right before a string: put a space between them")
    name = token["called"] or (token["quoted"] if token["quoted_call"] else None)
    if name is not None and name.lower() not in FUNCTIONS | _WORDS:
        known = ", ".join(sorted(FUNCTIONS))
        raise ConfigError(f"the filter's function {name} is not one of those served: {known}")
