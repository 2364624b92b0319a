"""Strategies for files and documents of strangers: a good one, with something changed, cut or put in."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.messages import TEXTS

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2**31, 2**63, 10**30, 1.5, 1e308, -0.0]),
    st.sampled_from([[], {}, [[]], [None], [1, "a"], {"a": {"b": [1]}}]),
    TEXTS,
)
# Put into a document's text as they are: no encoder would write them.
ODDITIES = st.sampled_from(
    [
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"9" * 5000,
        b'"\\ud800"',
        b'"\\u0000"',
        b"[" * 3000,
        b'{"a":1,"a":2}',
        b"\xff",
        b"",
    ]
)


def damaged(good: bytes) -> st.SearchStrategy[bytes]:
    """The bytes with a few of them changed, cut out or put in."""
    places = st.integers(0, len(good))
    return st.builds(
        lambda at, cut, noise: good[:at] + noise + good[at + cut :], places, st.integers(0, 8), st.binary(max_size=8)
    )


def changed_json(good: Any) -> st.SearchStrategy[bytes]:
    """The document with another value in one or two of its places, and now and then with what is no JSON."""
    text = json.dumps(good).encode()
    changed = st.lists(st.tuples(st.integers(0, 10**6), VALUES), min_size=1, max_size=2).map(
        lambda changes: json.dumps(_changed(good, changes)).encode()
    )
    odd = st.builds(_with_oddity, st.just(good), st.integers(0, 10**6), ODDITIES)
    return st.one_of(changed, changed, changed, odd, damaged(text), st.just(text))


def _changed(good: Any, changes: list[tuple[int, Any]]) -> Any:
    document = json.loads(json.dumps(good))
    for place, value in changes:
        places = list(_places(document))
        if not places:
            return value
        holder, key = places[place % len(places)]
        if place % 7 == 0 and isinstance(holder, dict):
            del holder[key]
        else:
            holder[key] = copy.deepcopy(value)
    return document


def _with_oddity(good: Any, place: int, oddity: bytes) -> bytes:
    mark = "0dd17y"
    return json.dumps(_changed(good, [(place, mark)])).encode().replace(f'"{mark}"'.encode(), oddity)


def _places(document: Any) -> Any:
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield document, key
        yield from _places(value)
