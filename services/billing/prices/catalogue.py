"""All versions of price books: read from their folder, and remembered in the database. Not pure: files, database.

A version that has been in force never changes, and does not end before what it has priced. An end that it was stored
with stays. A file that says otherwise stops the start.
"""

import dataclasses
from collections.abc import Iterable
from datetime import date, datetime, timedelta
from pathlib import Path

from chassis.db.pool import Connection
from services.billing.prices.parse import read_book
from services.billing.prices.pricebook import BookConflict, PriceBook, refuse_conflict
from services.billing.prices.pricing import PriceUnknown
from services.billing.prices.store import PriceStore
from services.billing.prices.yaml import BookInvalid


class Catalogue:
    """All versions of all books. A version never changes: a job settles by the one that it was quoted with."""

    def __init__(self, books: Iterable[PriceBook], *, current: str, retired: Iterable[PriceBook] = ()) -> None:
        """`current` names the book that prices new work; `retired` versions only settle what they priced."""
        self._current = current
        self._by_version: dict[str, PriceBook] = {}
        for book in books:
            refuse_conflict(self._by_version.values(), book)
            self._by_version[book.version] = book
        if not any(book.book == current for book in self._by_version.values()):
            raise BookConflict(f"there is no version of the price book {current!r}")
        self._retired = {book.version: book for book in retired}

    def version(self, version: str) -> PriceBook:
        book = self._by_version.get(version) or self._retired.get(version)
        if book is None:
            raise PriceUnknown(f"there is no price book version {version!r}; known are {', '.join(self.versions())}")
        return book

    def at(self, moment: datetime) -> PriceBook:
        """The version of the current book that is effective at `moment`."""
        for book in self._by_version.values():
            if book.book == self._current and book.effective_at(moment):
                return book
        raise PriceUnknown(f"no version of the price book {self._current!r} is effective at {moment.isoformat()}")

    def within(self, start: datetime, end: datetime) -> list[PriceBook]:
        """The versions of the current book that are effective between two moments, the earliest first."""
        found = [
            book
            for book in self._by_version.values()
            if book.book == self._current
            and book.effective_from < end
            and (book.effective_until is None or start < book.effective_until)
        ]
        return sorted(found, key=lambda book: book.effective_from)

    def versions(self) -> list[str]:
        return sorted(self._by_version)


async def open_catalogue(connection: Connection, folder: Path, *, current: str) -> Catalogue:
    """All versions of the folder, and those of the past: a job that was quoted with a removed file settles by it."""
    prices = PriceStore(connection)
    files = read_folder(folder)
    stored = {
        version: read_book(source, f"stored price book {version}")
        for version, source in (await prices.list_books()).items()
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
                f"{book.origin.dates}: price book version {version!r} ends on {before.effective_until:%Y-%m-%d} since"
                " it came into force; write that end back, and let the next version begin on it"
            )
        if book.effective_until is not None:
            _refuse_early_end(book, book.effective_until, await prices.get_last_priced_day(version))
        await prices.insert(version=version, book=book.book, source=text)
    return Catalogue(
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


def read_folder(folder: Path) -> dict[str, tuple[PriceBook, str]]:
    """Version -> the book and its text."""
    found: dict[str, tuple[PriceBook, str]] = {}
    for path in book_paths(folder):
        text = book_text(path, path.name)
        book = read_book(text, path.name)
        refuse_conflict((other for other, _ in found.values()), book)
        found[book.version] = (book, text)
    return found


def book_paths(folder: Path) -> list[Path]:
    """The books of a folder, with either ending: a book that is passed over would leave old prices in force."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml"))


def book_text(path: Path, origin: str) -> str:
    """What a book's file holds; BookInvalid where it is no UTF-8."""
    content = path.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BookInvalid(f"{origin}, line {line}: not UTF-8: {error.reason}") from error
