"""Checks price books before they are deployed and shows what they say.

Run `python -m services.billing.prices.check [PATH...]`. A path is a book or a folder of books; without one it reads the
folder that ships with billing. It reads every book and tells the first mistake of each, with its line, and whether they
can be in one catalogue. It opens no database: whether a version has been in force with other content is seen only when
billing starts.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from services.billing.config import BillingSettings
from services.billing.prices.catalogue import book_paths, book_text
from services.billing.prices.method_keys import METHODS
from services.billing.prices.parse import read_book
from services.billing.prices.pricebook import BookConflict, PriceBook, refuse_conflict
from services.billing.prices.pricing import OWING_ENDINGS, in_dollars
from services.billing.prices.yaml import BookInvalid

EXIT_WRONG = 1
EXIT_USAGE = 2


def read_books(paths: Sequence[Path]) -> tuple[list[PriceBook], list[str]]:
    """The books that are right, and what is wrong with the others or between them."""
    books: list[PriceBook] = []
    problems: list[str] = []
    for path in paths:
        try:
            book = read_book(book_text(path, str(path)), str(path))
            refuse_conflict(books, book)
        except (BookInvalid, BookConflict) as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{path}: {error}")
        else:
            books.append(book)
    return books, problems


def describe(book: PriceBook) -> Iterator[str]:
    """What a book says, a line each."""
    until = f"until {book.effective_until.date()}" if book.effective_until else "with no end"
    yield f"{book.version} ({book.origin.file})"
    yield f"  book {book.book}, in force from {book.effective_from.date()} {until}"
    yield "  tuning"
    for term in book.tuning_rule.terms:
        yield f"    {term.description}: {' x '.join((term.tokens, *term.times, 'rate'))}"
    rule = book.tuning_rule
    yield f"    base fee {_fixed(rule.base_fee_nanos_usd, rule.base_fee_applies_to)}"
    yield f"    minimum {_fixed(rule.minimum_nanos_usd, rule.minimum_applies_to)}"
    rows: list[Sequence[str]] = [("USD per million tokens", *METHODS)]
    for rate in book.tuning_rates:
        prices = [rate.nanos_usd_per_million.get(method) for method in METHODS]
        rows.append((str(rate.selector), *("-" if price is None else in_dollars(price) for price in prices)))
    yield from _table(rows)
    if book.inference_rates:
        yield "  inference"
        yield from _table(
            [("USD per million tokens", "input", "output")]
            + [
                (
                    str(rate.selector),
                    in_dollars(rate.input_nanos_usd_per_million),
                    in_dollars(rate.output_nanos_usd_per_million),
                )
                for rate in book.inference_rates
            ]
        )
    if book.hosting_rates:
        yield "  hosting"
        yield from _table(
            [("USD per device", "hour", "started minute")]
            + [
                (
                    str(rate.selector),
                    in_dollars(rate.nanos_usd_per_device_hour),
                    in_dollars(rate.nanos_usd_per_device_minute),
                )
                for rate in book.hosting_rates
            ]
        )
    if book.cluster_rates:
        yield "  clusters"
        yield from _table(
            [("USD per node", "started hour")]
            + [(str(rate.selector), in_dollars(rate.nanos_usd_per_node_hour)) for rate in book.cluster_rates]
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m services.billing.prices.check", description="Checks price books.")
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="a book, or a folder of books")
    given = parser.parse_args(arguments).paths or [BillingSettings.model_fields["price_books_dir"].default]
    paths = [path for each in given for path in (book_paths(each) if each.is_dir() else [each])]
    if not paths:
        print(f"no price book in {', '.join(map(str, given))}", file=sys.stderr)
        return EXIT_USAGE
    books, problems = read_books(paths)
    for book in books:
        print(*describe(book), sep="\n", end="\n\n")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return EXIT_WRONG if problems else 0


def _fixed(nanos_usd: int, applies_to: frozenset[str]) -> str:
    names = [ending for ending in OWING_ENDINGS if ending in applies_to]
    return f"{in_dollars(nanos_usd)} USD for {', '.join(names) or 'no ending'}" if nanos_usd else "none"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield "    " + "  ".join(cells)


if __name__ == "__main__":
    sys.exit(main())
