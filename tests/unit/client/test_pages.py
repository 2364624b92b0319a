"""Lists are walked page by page, and no page is asked for that nobody wants."""

from dataclasses import dataclass, field

import pytest

from finemesh_client.paging import pages


@dataclass
class Page:
    items: list[int]
    next_page_token: str


@dataclass
class Server:
    """Pages of the given sizes; a filter that little matches makes them empty."""

    sizes: tuple[int, ...]
    asked: list[str] = field(default_factory=list)

    async def fetch(self, token: str) -> Page:
        self.asked.append(token)
        index = int(token or 0)
        last = index == len(self.sizes) - 1
        first = sum(self.sizes[:index])
        return Page(list(range(first, first + self.sizes[index])), "" if last else str(index + 1))


@pytest.mark.parametrize(
    ("limit", "found", "fetches"),
    [(None, 6, 5), (7, 6, 5), (6, 6, 4), (5, 5, 4), (4, 4, 2), (2, 2, 1), (1, 1, 1), (0, 0, 0)],
)
async def test_a_limit_that_is_reached_ends_the_walk(limit: int | None, found: int, fetches: int) -> None:
    server = Server(sizes=(2, 2, 0, 2, 0))
    assert [item async for item in pages(server.fetch, "items", limit)] == list(range(found))
    assert server.asked == ["", "1", "2", "3", "4"][:fetches]
