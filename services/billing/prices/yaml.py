"""A node of a YAML file that knows its line, and the scalars of a price book. It knows no section of a book.

Amounts are read from the text of the file, never through a float. A value must be of the YAML type that it is used as,
so that this reader and `books/schema.json` take and refuse the same files.
"""

import re
from collections.abc import Sequence
from datetime import UTC, date, datetime
from decimal import Decimal

import yaml

from services.billing.prices.pricing import NANOS_USD_PER_USD

# A rate above this is a slip of the keyboard: a million dollars for a million tokens, or for an hour.
AMOUNT_USD_MAX = 10**6
BILLIONS_MAX = 10**5
ENTRIES_MAX = 5000
WORDS_CHARS_MAX = 200
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
# No zero in front: to some readers of YAML 010 is eight.
_AMOUNT = re.compile(r"(0|[1-9][0-9]{0,14})(\.[0-9]{1,9})?")
_WHOLE = re.compile(r"0|[1-9][0-9]{0,14}")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_TYPES = {
    "tag:yaml.org,2002:str": "text",
    "tag:yaml.org,2002:int": "a whole number",
    "tag:yaml.org,2002:float": "a number",
    "tag:yaml.org,2002:bool": "a yes or no",
    "tag:yaml.org,2002:null": "nothing",
    "tag:yaml.org,2002:timestamp": "a date",
}


class BookInvalid(ValueError):
    """The message begins with file and line."""


class Node:
    """A node of the file that knows where it stands."""

    def __init__(self, node: yaml.Node, origin: str) -> None:
        self._node = node
        self._origin = origin

    @property
    def line(self) -> int:
        return int(self._node.start_mark.line) + 1

    def wrong(self, problem: str) -> BookInvalid:
        return BookInvalid(f"{self._origin}, line {self.line}: {problem}")

    def fields(self, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, "Node"]:
        """The entries of a mapping; unknown, double and missing keys are refused."""
        for key, _ in self._pairs():
            if key.text() not in needed and key.text() not in optional:
                raise key.wrong(f"{key.text()!r} is not known here; known are {', '.join((*needed, *optional))}")
        found = self.entries()
        for name in needed:
            if name not in found:
                raise self.wrong(f"{name!r} is missing")
        return found

    def one_of_fields(self, found: dict[str, "Node"], names: Sequence[str], why: str) -> str:
        """Which of `names` is given, of which there must be exactly one."""
        given = [name for name in names if name in found]
        if len(given) != 1:
            raise self.wrong(f"exactly one of {' and '.join(map(repr, names))} says {why}")
        return given[0]

    def entries(self) -> dict[str, "Node"]:
        """The values of a mapping by key."""
        found: dict[str, Node] = {}
        lines: dict[str, int] = {}
        for key, value in self._pairs():
            name = key.text()
            if name in found:
                raise key.wrong(f"{name!r} is given twice, first in line {lines[name]}")
            found[name], lines[name] = value, key.line
        return found

    def identified(self) -> dict[str, "Node"]:
        """The values of a mapping whose keys are ids."""
        for key, _ in self._pairs():
            key.identifier()
        return self.entries()

    def items(self) -> list["Node"]:
        if not isinstance(self._node, yaml.SequenceNode):
            raise self.wrong("a list is expected")
        if len(self._node.value) > ENTRIES_MAX:
            raise self.wrong(f"a list has at most {ENTRIES_MAX} entries")
        return [Node(node, self._origin) for node in self._node.value]

    def text(self) -> str:
        """What stands there, whatever type YAML gives it."""
        if not isinstance(self._node, yaml.ScalarNode) or not self._node.value:
            raise self.wrong("a value is expected")
        return str(self._node.value)

    def words(self) -> str:
        """A text for people."""
        self._is("text")
        if len(self.text()) > WORDS_CHARS_MAX or not self.text().isprintable():
            raise self.wrong(f"a description has at most {WORDS_CHARS_MAX} printable characters")
        return self.text()

    def identifier(self) -> str:
        self._is("text")
        if not _IDENTIFIER.fullmatch(self.text()):
            raise self.wrong(f"{self.text()!r} is no id: letters, digits and . _ / - are allowed")
        return self.text()

    def prefix(self) -> str:
        """The part of `meta-llama/*` before the star; empty for a star alone."""
        self._is("text")
        if self.text() != "*" and not _IDENTIFIER.fullmatch(self.text()[:-1]):
            raise self.wrong(f"{self.text()!r} is no pattern: an id with one star at its end")
        return self.text()[:-1]

    def one_of(self, choices: Sequence[str]) -> str:
        self._is("text")
        if self.text() not in choices:
            raise self.wrong(f"{self.text()!r} is not one of {', '.join(choices)}")
        return self.text()

    def nanos_usd(self) -> int:
        """An amount in dollars, as nano-dollars."""
        self._is("a whole number", "a number", "text")
        if not _AMOUNT.fullmatch(self.text()):
            raise self.wrong(f"an amount is dollars with at most nine decimals and not negative, not {self.text()!r}")
        nanos = int(Decimal(self.text()) * NANOS_USD_PER_USD)
        if nanos > AMOUNT_USD_MAX * NANOS_USD_PER_USD:
            raise self.wrong(f"an amount is at most {AMOUNT_USD_MAX} dollars, not {self.text()}")
        return nanos

    def billions(self) -> int:
        self._is("a whole number", otherwise="a size is a whole number of billions")
        if not _WHOLE.fullmatch(self.text()) or int(self.text()) > BILLIONS_MAX:
            raise self.wrong(f"a size is a whole number of billions up to {BILLIONS_MAX}: {self.text()!r}")
        return int(self.text())

    def moment(self) -> datetime:
        """Midnight UTC of a date."""
        self._is("a date", "text", otherwise=f"{self.text()!r} is no date like 2026-01-31")
        try:
            day = date.fromisoformat(self.text() if _DATE.fullmatch(self.text()) else "")
        except ValueError:
            raise self.wrong(f"{self.text()!r} is no date like 2026-01-31") from None
        return datetime(day.year, day.month, day.day, tzinfo=UTC)

    def _pairs(self) -> list[tuple["Node", "Node"]]:
        if not isinstance(self._node, yaml.MappingNode):
            raise self.wrong("a mapping is expected")
        if len(self._node.value) > ENTRIES_MAX:
            raise self.wrong(f"a mapping has at most {ENTRIES_MAX} entries")
        return [(Node(key, self._origin), Node(value, self._origin)) for key, value in self._node.value]

    def _is(self, *types: str, otherwise: str = "") -> None:
        text = self.text()
        found = _TYPES.get(self._node.tag, "of an unknown type")
        if found not in types:
            quotes = ", so it belongs in quotes" if "text" in types else ""
            raise self.wrong(otherwise or f"{text!r} is {found} to YAML{quotes}")


def read_root(text: str, origin: str) -> Node:
    """`origin` is the file's name, for the messages of BookInvalid."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise BookInvalid(f"{origin}, line {line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise BookInvalid(f"{origin}, line 1: {error}") from None
    if node is None:
        raise BookInvalid(f"{origin}, line 1: the file is empty")
    return Node(node, origin)
