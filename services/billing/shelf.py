"""Reads the folder of price books at the start and keeps what has been in force in the database.

A version that has been in force never changes, and does not end before what it has priced; an end that it was stored
with stays. A file that says otherwise stops the start.
"""

import dataclasses
from datetime import date, datetime, timedelta
from pathlib import Path

from chassis.db.pool import Connection
from services.billing import store
from services.billing.bookfile import read_book
from services.billing.bookfolder import read_folder
from services.billing.pricebook import BookConflict, PriceBook, Shelf


async def open_shelf(connection: Connection, folder: Path, *, current: str) -> Shelf:
    """All versions of the folder, and those of the past: a job that was quoted with a removed file settles by it."""
    files = read_folder(folder)
    stored = {
        version: read_book(source, f"stored price book {version}")
        for version, source in (await store.list_price_books(connection)).items()
    }
    for version, (book, text) in files.items():
        before = stored.get(version, book)
        # Only the end of a version may be added later: that is how a next version takes over.
        if dataclasses.replace(before, effective_until=book.effective_until) != book:
            raise BookConflict(
                f"{book.origin.version}: price book version {version!r} differs from what has been in force;"
                " write a new version instead"
            )
        if before.effective_until is not None and before.effective_until != book.effective_until:
            raise BookConflict(
                f"{book.origin.dates}: price book version {version!r} ends on {before.effective_until:%Y-%m-%d} since it"
                " came into force; write that end back, and let the next version begin on it"
            )
        if book.effective_until is not None:
            _refuse_early_end(book, book.effective_until, await store.get_last_priced_day(connection, version))
        await store.insert_price_book(connection, version=version, book=book.book, source=text)
    return Shelf(
        (book for book, _ in files.values()),
        current=current,
        retired=(book for version, book in stored.items() if version not in files),
    )


def _refuse_early_end(book: PriceBook, until: datetime, last_day: date | None) -> None:
    """What a version priced is its own: a replay would price it by the next one."""
    if last_day is None or last_day < until.date():
        return
    raise BookConflict(
        f"{book.origin.dates}: price book version {book.version!r} priced use of {last_day}, so it cannot end before"
        f" {last_day + timedelta(days=1)}"
    )
