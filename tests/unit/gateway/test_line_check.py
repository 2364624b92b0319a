"""The dataset check: every kind of error by line and path, at any chunking, in bounded memory, whatever the bytes."""

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.line_parser import LineParser
from formats.work import TooMuchWork
from services.gateway.files.dataset_report import DatasetLimits, DatasetReport
from services.gateway.files.line_check import LineCheck
from services.gateway.files.plain_lines import PlainLines

LIMITS = DatasetLimits(
    line_bytes_max=4096, lines_max=1000, messages_max=5, errors_max=10, cells_max=1, expanded_bytes_max=1
)
GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
PAIR = {"prompt": "One plus one is", "completion": " two"}


def check(content: bytes, limits: DatasetLimits = LIMITS, chunk_bytes: int = 1 << 20) -> DatasetReport:
    checker = LineCheck(limits, PlainLines)
    for start in range(0, len(content), chunk_bytes):
        checker.feed(content[start : start + chunk_bytes])
    return checker.finish()


def lines(*documents: object) -> bytes:
    return b"".join(json.dumps(document).encode() + b"\n" for document in documents)


def places(report: DatasetReport) -> list[tuple[int, str]]:
    return [(error.line, error.path) for error in report.errors]


@pytest.mark.parametrize(("document", "expected"), [(GOOD, "conversation"), (PAIR, "instruction")])
def test_a_sound_file_has_a_format_and_no_errors(document, expected):
    report = check(lines(document, document) + b"\n  \n" + lines(document)[:-1])
    assert (report.format, report.line_count, report.error_count, report.errors) == (expected, 3, 0, ())


def message(**changes: object) -> dict:
    return {"messages": [{"role": "user", "content": "Hi", **changes}, {"role": "assistant", "content": "Ho"}]}


@pytest.mark.parametrize(
    ("content", "place", "expectation"),
    [
        (b"", (0, "$"), "at least one example"),
        (b" \n\n\t\n", (0, "$"), "at least one example"),
        (b"\xef\xbb\xbf" + lines(GOOD), (1, "$"), "byte order mark"),
        (lines(GOOD) + b'{"prompt": "\xff"}\n', (2, "$"), "UTF-8"),
        (lines(GOOD) + b"{oops}\n", (2, "$"), "a JSON object"),
        (b'{"prompt": NaN, "completion": "a"}', (1, "$"), "a JSON object"),
        (b'{"completion": "a", "prompt": 1' + b"0" * 4000 + b"}", (1, "$.prompt"), "a string"),
        (lines(GOOD) + b"[" * 4000, (2, "$"), "a JSON object"),
        (lines(GOOD, [1, 2]), (2, "$"), "a JSON object"),
        (lines(GOOD, "text"), (2, "$"), "a JSON object"),
        (lines([1, 2]) * 2, (0, "$"), "jq -c '.[]' FILE"),
        (b"[" * 40_000, (0, "$"), "jq -c '.[]' FILE"),
        (lines("text") * 2, (0, "$"), "rows of {"),
        (b"\xff" * 8000, (0, "$"), "in UTF-8"),
        (lines({"words": "raw"}), (1, "$"), "the key `messages`"),
        (lines({**GOOD, "functions": []}), (1, "$.functions"), "as tools"),
        (lines(message(role="robot")), (1, "$.messages[0].role"), "one of system, developer, user, assistant"),
        (lines(message(role=["user"])), (1, "$.messages[0].role"), "one of system, developer, user, assistant"),
        (lines(message(content=None)), (1, "$.messages[0].content"), "a string"),
        (lines(message(content="\ud800")), (1, "$.messages[0].content"), "surrogates"),
        (lines(message(weight=2)), (1, "$.messages[0].weight"), "0 or 1"),
        (lines(message(weight=True)), (1, "$.messages[0].weight"), "0 or 1"),
        (lines(message(mood="good")), (1, "$.messages[0].mood"), "no such key"),
        (lines({"messages": []}), (1, "$.messages"), "at least one message"),
        (lines({"messages": "Hi"}), (1, "$.messages"), "a list"),
        (lines({"messages": GOOD["messages"] * 3}), (1, "$.messages"), "at most 5 messages"),
        (lines({"messages": GOOD["messages"][:1]}), (1, "$.messages"), "assistant"),
        (lines({"messages": [1, *GOOD["messages"]]}), (1, "$.messages[0]"), "an object"),
        (lines(GOOD, PAIR), (2, "$"), "conversation format"),
        (lines({"prompt": "x"}), (1, "$.completion"), "a string"),
        (lines({"prompt": "x", "completion": ""}), (1, "$.completion"), "not empty"),
        (lines({"prompt": 3, "completion": "x"}), (1, "$.prompt"), "a string"),
        (lines(GOOD, {**PAIR, "prompt": "x" * 5000}, GOOD), (2, "$"), "at most 4096 bytes"),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 100, 1 << 20])
def test_each_fault_is_one_error_with_its_place(content, place, expectation, chunk_bytes):
    report = check(content, chunk_bytes=chunk_bytes)
    assert places(report) == [place]
    assert report.error_count == 1
    assert expectation in report.errors[0].expectation
    assert report.errors[0].found


@pytest.mark.parametrize("row", [GOOD, PAIR, {}])
def test_rows_are_bounded_and_the_refusal_says_how_many_there_may_be(row):
    assert check(lines(*[row] * 1000)).line_count == 1000
    with pytest.raises(TooMuchWork) as told:
        check(lines(*[row] * 5000))
    assert (told.value.unit, told.value.found, told.value.limit) == ("rows", 1001, 1000)


def test_every_error_comes_at_once():
    bad = {"messages": [{"role": "robot", "content": 1, "weight": 7}, {"role": "assistant", "content": "Ho"}]}
    report = check(lines(GOOD, bad, {"prompt": "x"}) + b"\xff\n" + lines(bad))
    assert places(report) == [
        (2, "$.messages[0].role"),
        (2, "$.messages[0].content"),
        (2, "$.messages[0].weight"),
        (3, "$.completion"),
        (3, "$"),
        (4, "$"),
        (5, "$.messages[0].role"),
        (5, "$.messages[0].content"),
        (5, "$.messages[0].weight"),
    ]


def test_errors_are_capped_and_all_are_counted():
    report = check(b"{}\n" * 777)
    assert len(report.errors) == 10
    assert report.error_count == 777
    assert report.line_count == 777


def test_memory_stays_with_one_line_of_a_long_file():
    chunk = b"{" + b"x" * (1 << 20)
    checker = LineCheck(LIMITS, PlainLines)
    tracemalloc.start()
    try:
        for _ in range(64):
            checker.feed(chunk)
        report = checker.finish()
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert places(report) == [(1, "$")]
    assert peak_bytes < 4 << 20


DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["messages", "role", "content", "weight", "prompt", "completion", "tools"])
            | st.text(max_size=5),
            inner | st.sampled_from(["user", "assistant", "system"]),
            max_size=5,
        )
    ),
    max_leaves=20,
)
FILES = st.lists(st.binary(max_size=60) | DOCUMENTS.map(lambda document: json.dumps(document).encode()), max_size=8)


TRICKY = st.text(st.sampled_from(list('ab:"{}\n\\\u00e9\ud800\x00 \u003a')), max_size=6)
PLAIN = st.one_of(
    st.fixed_dictionaries({"text": TRICKY}),
    st.fixed_dictionaries({"prompt": TRICKY, "completion": TRICKY}),
    st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TRICKY}),
        min_size=1,
        max_size=6,
    ).map(lambda messages: {"messages": messages}),
)
TWICE = ['"role":"user",', '"content" :"x:",', '"text"\t: "a",', '"messages":[],', '"prompt":"\\u003a",', "", "", ""]


@given(st.lists(st.tuples(PLAIN, st.booleans(), st.sampled_from(TWICE), st.integers(0, 40)), min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_what_is_seen_at_once_is_what_the_parser_says_line_by_line(rows):
    """Also of keys that come twice, of texts that look like keys, and of line breaks in odd places."""
    found = []
    for document, ascii_only, twice, place in rows:
        text = json.dumps(document, ensure_ascii=ascii_only, separators=(",", ":" if place % 2 else " : "))
        at = [index for index, char in enumerate(text) if char == "{"]
        where = at[place % len(at)] + 1
        found.append((text[:where] + twice + text[where:]).encode("utf-8", "surrogatepass"))
    content = b"\n".join(found)
    parser = LineParser(LIMITS.errors_max, messages_max=LIMITS.messages_max)
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            parser.row(number, line)
    # The first line is read alone; the others at once.
    report = check(content + b"\n")
    assert report.errors == tuple(parser.errors.kept)
    assert (report.error_count, report.format) == (parser.errors.count, parser.expected)
    assert report.features == parser.features


@given(FILES, st.integers(1, 50))
@settings(max_examples=200, deadline=None)
def test_no_bytes_crash_it_and_chunks_do_not_matter(parts, chunk_bytes):
    content = b"\n".join(parts)
    whole = check(content)
    assert check(content, chunk_bytes=chunk_bytes) == whole
    assert len(whole.errors) == min(whole.error_count, LIMITS.errors_max)
    assert list(places(whole)) == sorted(places(whole), key=lambda place: place[0])
    for error in whole.errors:
        for text in (error.path, error.expectation, error.found):
            assert text.isprintable()
            assert len(text.encode()) < 1000
