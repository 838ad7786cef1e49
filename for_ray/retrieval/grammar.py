"""The grammar of questions: words → what an image must show, and what it must not.

It is described in `docs/questions.md`, for those who ask and for those who read this. A question is brought
into clauses: an image answers it if it answers one of them, and a clause if it shows all that is wanted and
nothing that is unwanted.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from for_ray.errors import ConfigError

MAX_LETTERS = 1000
"""Of a question. Text towers read the first 77 tokens of a name, about 300 letters."""

MAX_NAMES = 8
"""Mentioned in a question; the assignment to slots looks at all subsets of a clause's names."""

MAX_DEPTH = 20
"""Of parentheses and NOT inside each other."""

_TOKEN = re.compile(r'(?P<bracket>[()])|["“”](?P<quoted>[^"“”]*)(?P<end>["“”])?|(?P<word>[^\s()"“”]+)')
_KEYWORDS = frozenset({"AND", "OR", "NOT"})
_SHOWN = 72  # letters of a question around the caret


class QuestionError(ConfigError):
    """A question that doesn't parse; its text ends with the question and a caret under the spot.

    Attributes:
        reason: What is wrong and what to do, one line.
        position: The letter of the question that it is about, from 0; its length for the end.
    """

    def __init__(self, question: str, position: int, reason: str) -> None:
        super().__init__(question, position, reason)
        self.question = question
        self.position = position
        self.reason = reason

    def __str__(self) -> str:
        said = f"the question doesn't parse: {self.reason}"
        if not self.question.strip() or len(self.question) > MAX_LETTERS:
            return said
        start = max(min(self.position - _SHOWN // 2, len(self.question) - _SHOWN), 0)
        line = "".join(
            letter if letter.isprintable() else " " for letter in self.question[start : start + _SHOWN]
        )
        cut = "…" if start else ""
        indent = " " * (2 + len(cut) + _columns(line[: self.position - start]))
        return f"{said}\n  {cut}{line}\n{indent}^"


class Clause(NamedTuple):
    """What an image must show and must not show; indices into the question's names.

    Attributes:
        wanted: One or more, ascending; a name that stands twice asks for two objects.
        unwanted: Ascending, each once, none that is wanted.
    """

    wanted: tuple[int, ...]
    unwanted: tuple[int, ...]


class ParsedQuestion(NamedTuple):
    """A question's names, each once and with single spaces, and its clauses, one or more."""

    names: tuple[str, ...]
    clauses: tuple[Clause, ...]


def parse(question: str) -> ParsedQuestion:
    """Read a question.

    Raises:
        QuestionError: It is empty, too long, not of the grammar, or only says what an image must not show.
    """
    if len(question) > MAX_LETTERS:
        reason = f"it has {len(question):,} letters, and {MAX_LETTERS:,} is the limit: ask with fewer words"
        raise QuestionError(question, MAX_LETTERS, reason)
    parser = _Parser(question)
    clauses = parser.parse()
    mentions = sorted((mention.position, mention.name) for clause in clauses for mention in clause)
    names = tuple(dict.fromkeys(name for _, name in mentions))
    packed = dict.fromkeys(_packed(clause, names) for clause in clauses)
    _check_wanted(question, clauses)
    possible = tuple(clause for clause in packed if not set(clause.wanted) & set(clause.unwanted))
    if not possible:
        contradicted = next(mention for clause in clauses for mention in clause if mention.is_unwanted)
        reason = f"no image shows {contradicted.name!r} and does not show it: leave one of the two out"
        raise QuestionError(question, contradicted.position, reason)
    return ParsedQuestion(names, possible)


class _Mention(NamedTuple):
    """A name where it stands, and whether an odd number of NOTs stand over it."""

    name: str
    position: int
    is_unwanted: bool


_Conjunction = tuple[_Mention, ...]
_Clauses = tuple[_Conjunction, ...]


class _Token(NamedTuple):
    kind: str  # AND, OR, NOT, (, ), name, end
    text: str
    position: int


class _Parser:
    """Recursive descent; each method gives the clauses of what it read, those of its opposite under a NOT."""

    def __init__(self, question: str) -> None:
        self._question = question
        self._tokens = list(_tokens(question))
        self._next = 0
        self._num_names = 0

    def parse(self) -> _Clauses:
        if self._peek().kind == "end":
            self._refuse("it is empty: say what an image should show, such as 'a red car'")
        clauses = self._any(is_unwanted=False, depth=0)
        if self._peek().kind != "end":
            self._refuse_rest()
        return clauses

    def _any(self, *, is_unwanted: bool, depth: int) -> _Clauses:
        parts = [self._all(is_unwanted=is_unwanted, depth=depth)]
        while self._peek().kind == "OR":
            self._take()
            parts.append(self._all(is_unwanted=is_unwanted, depth=depth))
        return _both(parts) if is_unwanted else _either(parts)

    def _all(self, *, is_unwanted: bool, depth: int) -> _Clauses:
        parts = [self._part(is_unwanted=is_unwanted, depth=depth)]
        while self._peek().kind in {"AND", "NOT"}:
            if self._peek().kind == "AND":
                self._take()
            parts.append(self._part(is_unwanted=is_unwanted, depth=depth))
        return _either(parts) if is_unwanted else _both(parts)

    def _part(self, *, is_unwanted: bool, depth: int) -> _Clauses:
        if depth > MAX_DEPTH:
            self._refuse(f"more than {MAX_DEPTH} parentheses or NOTs inside each other: write it flatter")
        token = self._take()
        if token.kind == "NOT":
            return self._part(is_unwanted=not is_unwanted, depth=depth + 1)
        if token.kind == "(":
            inside = self._any(is_unwanted=is_unwanted, depth=depth + 1)
            if self._peek().kind == "end":
                self._refuse("this parenthesis is never closed: add )", token)
            if self._take().kind != ")":
                self._next -= 1
                self._refuse_rest()
            return inside
        if token.kind != "name":
            self._refuse_missing(token)
        self._num_names += 1
        if self._num_names > MAX_NAMES:
            self._refuse(f"more than {MAX_NAMES} names: ask for fewer things at once", token)
        return ((_Mention(token.text, token.position, is_unwanted),),)

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> _Token:
        token = self._tokens[self._next]
        self._next += token.kind != "end"
        return token

    def _refuse_missing(self, token: _Token) -> None:
        index = self._tokens.index(token)
        before = f" after {self._tokens[index - 1].text}" if index else ""
        found = "the end" if token.kind == "end" else token.text
        hint = "" if token.kind in {"end", "(", ")"} else f"; a name that is {found} goes in quotation marks"
        self._refuse(f"expected a name{before}, found {found}{hint}", token)

    def _refuse_rest(self) -> None:
        token = self._peek()
        if token.kind == ")":
            self._refuse("this parenthesis was never opened: remove it, or put the name in quotation marks")
        found = repr(token.text) if token.kind == "name" else token.text
        self._refuse(
            f"expected AND, OR, NOT or the end before {found}: put one there, or the whole name in "
            "quotation marks"
        )

    def _refuse(self, reason: str, token: _Token | None = None) -> None:
        raise QuestionError(self._question, (token or self._peek()).position, reason)


def _tokens(question: str) -> Iterator[_Token]:
    """Words that stand beside each other are one name."""
    words: list[re.Match[str]] = []
    for match in _TOKEN.finditer(question):
        is_word = match["word"] is not None and match["word"] not in _KEYWORDS
        if words and not is_word:
            yield _name(words)
            words = []
        if is_word:
            words.append(match)
        elif match["quoted"] is not None:
            yield _quoted(question, match)
        else:
            yield _Token(match[0], match[0], match.start())
    if words:
        yield _name(words)
    yield _Token("end", "", len(question))


def _name(words: list[re.Match[str]]) -> _Token:
    return _Token("name", " ".join(word[0] for word in words), words[0].start())


def _quoted(question: str, match: re.Match[str]) -> _Token:
    if match["end"] is None:
        raise QuestionError(question, match.start(), "this quotation mark is never closed: add another")
    name = " ".join(match["quoted"].split())
    if not name:
        raise QuestionError(question, match.start(), "the name in quotation marks is empty: fill it in")
    return _Token("name", name, match.start())


def _either(parts: Iterable[_Clauses]) -> _Clauses:
    return tuple(itertools.chain.from_iterable(parts))


def _both(parts: Iterable[_Clauses]) -> _Clauses:
    """Each clause of the one with each of the other: a conjunction of disjunctions, multiplied out."""
    return tuple(tuple(itertools.chain.from_iterable(chosen)) for chosen in itertools.product(*parts))


def _packed(clause: _Conjunction, names: tuple[str, ...]) -> Clause:
    wanted = sorted(names.index(mention.name) for mention in clause if not mention.is_unwanted)
    unwanted = {names.index(mention.name) for mention in clause if mention.is_unwanted}
    return Clause(tuple(wanted), tuple(sorted(unwanted)))


def _check_wanted(question: str, clauses: _Clauses) -> None:
    for clause in clauses:
        if all(mention.is_unwanted for mention in clause):
            reason = "this only says what an image must not show: add what it should show"
            raise QuestionError(question, clause[0].position, f"{reason}, as in 'a street NOT a car'")


def _columns(text: str) -> int:
    """Columns of a terminal that a text takes."""
    return sum(
        0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in {"W", "F"})
        for letter in text
    )
