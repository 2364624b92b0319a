"""Page tokens: they come back as they were made, for their own list only. Pages: every row once, and then an end."""

import base64
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chassis.errors import InvalidArgument
from chassis.paging import TIME_KINDS, Pages, page_size, time_cursor

PAGES = Pages("0123456789abcdef" * 3)
CURSORS = st.tuples(st.integers(min_value=-(2**63), max_value=2**63), st.text(max_size=50))


@given(cursor=CURSORS, scope=st.text(max_size=50))
def test_a_token_comes_back_as_it_was_made(cursor: tuple[int, str], scope: str) -> None:
    assert PAGES.decode(PAGES.encode(cursor, scope=scope), scope=scope, kinds=(int, str)) == cursor


def test_no_token_is_the_first_page() -> None:
    assert PAGES.decode("", scope="a", kinds=(int,)) is None


@given(st.text(min_size=1, max_size=2000))
def test_anything_else_is_refused_by_field(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        PAGES.decode(text, scope="a", kinds=(int, str))
    assert caught.value.violations[0].field == "page_token"


@pytest.mark.parametrize(("scope", "kinds"), [("b", (int, str)), ("a", (str, int)), ("a", (int,))])
def test_a_token_of_another_list_is_refused(scope: str, kinds: tuple[type, ...]) -> None:
    token = PAGES.encode((1, "x"), scope="a")
    with pytest.raises(InvalidArgument):
        PAGES.decode(token, scope=scope, kinds=kinds)


@given(cursor=CURSORS, place=st.integers(min_value=0), flipped=st.integers(min_value=1, max_value=255))
def test_a_token_with_any_byte_changed_is_refused(cursor: tuple[int, str], place: int, flipped: int) -> None:
    token = PAGES.encode(cursor, scope="a")
    content = bytearray(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    content[place % len(content)] ^= flipped
    with pytest.raises(InvalidArgument):
        PAGES.decode(base64.urlsafe_b64encode(content).decode(), scope="a", kinds=(int, str))


def test_replicas_with_one_key_read_each_others_tokens_and_nobody_elses() -> None:
    token = PAGES.encode((1,), scope="a")
    assert Pages("0123456789abcdef" * 3).decode(token, scope="a", kinds=(int,)) == (1,)
    for other in (Pages("another key of at least 32 letters"), Pages("")):
        with pytest.raises(InvalidArgument):
            other.decode(token, scope="a", kinds=(int,))


def test_sizes_are_clamped() -> None:
    assert page_size(0, default=7, maximum=9) == 7
    assert page_size(8, default=7, maximum=9) == 8
    assert page_size(10**9, default=7, maximum=9) == 9
    with pytest.raises(InvalidArgument):
        page_size(-1)


@dataclass
class Request:
    page_size: int = 0
    page_token: str = ""


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 6])
def test_pages_show_every_row_once_and_then_end(count: int) -> None:
    rows, request = list(range(count)), Request(page_size=2)
    shown: list[int] = []
    for _ in range(4):
        page = PAGES.read(request, scope="rows", kinds=(int,))
        read = [row for row in rows if row > page.after(-1)][: page.row_max]
        part, request.page_token = page.cut(read, lambda row: (row,))
        shown += part
        if not request.page_token:
            break
    assert shown == rows
    assert request.page_token == ""


def test_a_page_is_not_larger_than_its_list_allows() -> None:
    page = PAGES.read(Request(page_size=500), scope="rows", kinds=(str,), maximum=100)
    assert (page.size, page.row_max, page.after("start")) == (100, 101, "start")


def test_a_page_refuses_the_token_of_another_list() -> None:
    token = PAGES.read(Request(), scope="others", kinds=(int,)).token((1,))
    with pytest.raises(InvalidArgument):
        PAGES.read(Request(page_token=token), scope="rows", kinds=(int,))


def test_a_list_by_time_goes_on_at_the_same_moment_and_key() -> None:
    moment, key = datetime(2030, 1, 1, 0, 0, 0, 1, tzinfo=UTC), uuid.UUID(int=7)
    first = PAGES.read(Request(), scope="rows", kinds=TIME_KINDS)
    assert first.after_time(uuid.UUID) is None
    token = first.token(time_cursor(moment, key))
    assert PAGES.read(Request(page_token=token), scope="rows", kinds=TIME_KINDS).after_time(uuid.UUID) == (moment, key)
    for cursor in ((10**30, str(key)), (0, "no key")):
        page = PAGES.read(Request(page_token=first.token(cursor)), scope="rows", kinds=TIME_KINDS)
        with pytest.raises(InvalidArgument):
            page.after_time(uuid.UUID)
