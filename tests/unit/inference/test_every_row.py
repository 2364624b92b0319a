"""A list without pages for its caller is whole, or refused."""

from __future__ import annotations

import pytest

from chassis.errors import ResourceExhausted
from services.inference.api.pages import every_row


async def read(after: int, page_size: int) -> list[int]:
    """The numbers up to five, page by page."""
    return list(range(after + 1, 6))[:page_size]


@pytest.mark.parametrize("page_size", [1, 2, 5, 6])
async def test_a_list_is_whole_however_long_its_pages_are(page_size: int) -> None:
    rows = await every_row(read, 0, lambda row: row, page_size=page_size, rows_max=5)
    assert rows == [1, 2, 3, 4, 5]


async def test_a_list_that_is_too_long_is_refused_and_not_cut() -> None:
    with pytest.raises(ResourceExhausted, match="served_models_max"):
        await every_row(read, 0, lambda row: row, page_size=2, rows_max=4)
