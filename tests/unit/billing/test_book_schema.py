"""`books/schema.json` and the reader take and refuse the same files: whoever edits a book in an editor that knows the
schema sees there what the service would say at its start."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from services.billing.prices.method_keys import METHODS
from services.billing.prices.parse import read_book
from services.billing.prices.pricing import FACTORS_DONE, OWING_ENDINGS
from services.billing.prices.yaml import AMOUNT_USD_MAX, BILLIONS_MAX, ENTRIES_MAX, WORDS_CHARS_MAX, BookInvalid
from tests.unit.billing.wrong_books import GOOD, GOOD_IN_FULL, WRONG, WrongBook

BOOKS = Path(__file__).parents[3] / "services/billing/prices/books"
SCHEMA = json.loads((BOOKS / "schema.json").read_text(encoding="utf-8"))
VALIDATOR = Draft202012Validator(SCHEMA, format_checker=Draft202012Validator.FORMAT_CHECKER)
# What a schema of one document cannot say; all else that the reader refuses, the schema refuses too.
ONLY_THE_READER = ("ambiguous", "a range of sizes is", "must end after it begins")


class _Loader(yaml.SafeLoader):
    """Dates stay text, as in JSON and in the YAML of today's editors."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def loaded(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # noqa: S506


def reader_problem(text: str) -> str:
    try:
        read_book(text, "test.yaml")
    except BookInvalid as error:
        return str(error)
    return ""


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", sorted(BOOKS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_book_satisfies_the_schema(path: Path) -> None:
    assert [error.message for error in VALIDATOR.iter_errors(loaded(path.read_text(encoding="utf-8")))] == []


@pytest.mark.parametrize("book", [GOOD, GOOD_IN_FULL])
def test_good_books_satisfy_both(book: str) -> None:
    assert reader_problem(book) == ""
    assert VALIDATOR.is_valid(loaded(book))


@pytest.mark.parametrize("wrong", [wrong for wrong in WRONG if wrong.structural], ids=lambda wrong: wrong.problem)
def test_a_mistake_of_structure_is_refused_by_the_schema_too(wrong: WrongBook) -> None:
    assert not VALIDATOR.is_valid(loaded(wrong.text))


def _paths(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield here
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in entries:
        yield from _paths(child, (*here, key))


def _changed(book: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    book = copy.deepcopy(book)
    place = book
    for key in path[:-1]:
        place = place[key]
    if value is _GONE:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return book


_GONE = object()
_INSTEAD: tuple[Any, ...] = (
    *("words", "a b", "a/*", "a*b", "0.0000000001", "01", "", "2026-02-30", "evaluations", "x" * 201),
    *(0, -0.5, 1.5, AMOUNT_USD_MAX + 1, True, None),
    *([], [1, 2], ["epochs"], ["epochs", "epochs"], ["refused"], {}, {"usd": 1}),
)


def _mutations() -> Iterator[tuple[str, Any]]:
    """Each place of a full book: gone, of another type or value, or with one entry more."""
    book = loaded(GOOD_IN_FULL)
    for path in _paths(book):
        where = "/".join(map(str, path)) or "the root"
        if path:
            yield f"{where} gone", _changed(book, path, _GONE)
        for value in _INSTEAD:
            yield f"{where} = {value!r}", _changed(book, path, value)
        place = book
        for key in path:
            place = place[key]
        if isinstance(place, dict):
            yield f"{where} + colour", _changed(book, path, {**place, "colour": "red"})
        if isinstance(place, list) and place:
            yield f"{where} doubled", _changed(book, path, [*place, place[-1]])


def test_reader_and_schema_agree_on_every_small_change_of_a_book() -> None:
    apart = []
    count = 0
    for what, book in _mutations():
        count += 1
        problem = reader_problem(json.dumps(book))
        refused = bool(problem) and not any(words in problem for words in ONLY_THE_READER)
        if problem and not refused:
            continue
        if refused == VALIDATOR.is_valid(book):
            apart.append(f"{what}: the reader says {problem or 'yes'!r}")
    assert count > 1500
    assert apart == []


def test_limits_and_words_are_those_of_the_code() -> None:
    definitions = SCHEMA["$defs"]
    assert definitions["usd"]["anyOf"][0]["maximum"] == AMOUNT_USD_MAX
    assert definitions["billions"]["items"]["maximum"] == BILLIONS_MAX
    assert definitions["tuning"]["properties"]["rates"]["maxItems"] == ENTRIES_MAX
    assert definitions["term"]["properties"]["description"]["maxLength"] == WORDS_CHARS_MAX
    assert definitions["endings"]["items"]["enum"] == list(OWING_ENDINGS)
    assert definitions["term"]["properties"]["tokens"]["enum"] == list(FACTORS_DONE)
    methods = definitions["tuningRate"]["properties"]["usd_per_million_tokens"]["properties"]
    assert list(methods) == list(METHODS)
