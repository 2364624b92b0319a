"""The files of price books: which ones a folder holds, and their text. What they say is `bookfile.py`; it opens no
database.
"""

from pathlib import Path

from services.billing.bookfile import BookInvalid, read_book
from services.billing.pricebook import PriceBook, refuse_conflict


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
    """The books of a folder, whichever way their ending is written: one that is passed over leaves old prices in force."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml"))


def book_text(path: Path, origin: str) -> str:
    """What a book's file holds; BookInvalid where it is no UTF-8."""
    content = path.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BookInvalid(f"{origin}, line {line}: not UTF-8: {error.reason}") from error
