"""An invoice as PDF: A4, a table that breaks over pages, header and footer on each.

The same sheet is the same bytes: nothing in the file comes from the clock or from chance.
"""

import io
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

from reportlab.lib import colors
from reportlab.lib.enums import TA_RIGHT
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import ParagraphStyle
from reportlab.lib.units import mm
from reportlab.pdfbase.pdfmetrics import stringWidth
from reportlab.pdfgen.canvas import Canvas
from reportlab.platypus import (
    BaseDocTemplate,
    Frame,
    LongTable,
    PageBreak,
    PageTemplate,
    Paragraph,
    Spacer,
    Table,
    TableStyle,
)

from services.billing.invoices.documents.glyphs import BOLD, REGULAR, load_fonts, marked_up
from services.billing.invoices.documents.sheet import CURRENCY, Sheet, SheetLine

_MARGIN, _TOP, _BOTTOM = 16 * mm, 22 * mm, 20 * mm
_WIDTH = A4[0] - 2 * _MARGIN
_FIGURE_WIDTH, _AMOUNT_WIDTH, _COLUMN_GAP = 36 * mm, 30 * mm, 6
_COLUMNS = (_WIDTH - 2 * _FIGURE_WIDTH - _AMOUNT_WIDTH, _FIGURE_WIDTH, _FIGURE_WIDTH, _AMOUNT_WIDTH)
_HEADINGS = ("DESCRIPTION", "QUANTITY", "UNIT PRICE", "AMOUNT")
# The library measures the rest of a table anew at each page: many short tables grow with the lines, one long one with
# their square.
_TABLE_ROWS_MAX = 500
_GREY, _RULE = colors.HexColor("#555555"), colors.HexColor("#bbbbbb")

_TEXT = ParagraphStyle("text", fontName=REGULAR, fontSize=8.5, leading=11.5, splitLongWords=1)
_SMALL = ParagraphStyle("small", parent=_TEXT, fontSize=7, leading=9.5, textColor=_GREY)
_SMALL_RIGHT = ParagraphStyle("small-right", parent=_SMALL, alignment=TA_RIGHT)
_FIGURE = ParagraphStyle("figure", parent=_TEXT, alignment=TA_RIGHT)
_TOTAL = ParagraphStyle("total", parent=_FIGURE, fontName=BOLD, fontSize=11, leading=14)
_TITLE = ParagraphStyle("title", parent=_TEXT, fontName=BOLD, fontSize=18, leading=24)
_LABEL = ParagraphStyle("label", parent=_SMALL, fontName=BOLD)


def to_pdf(sheet: Sheet) -> bytes:
    load_fonts()
    out = io.BytesIO()
    document = BaseDocTemplate(
        out,
        pagesize=A4,
        title=sheet.title,
        subject=sheet.period,
        author=sheet.issuer[0] if sheet.issuer else "",
        creator="finemesh billing",
        invariant=1,
    )
    room = Frame(
        _MARGIN,
        _BOTTOM,
        _WIDTH,
        A4[1] - _TOP - _BOTTOM,
        leftPadding=0,
        rightPadding=0,
        topPadding=0,
        bottomPadding=0,
    )
    document.addPageTemplates(PageTemplate(frames=[room]))
    document.build(_story(sheet), canvasmaker=_numbered(sheet))
    return out.getvalue()


def _story(sheet: Sheet) -> list[Any]:
    title = f"Invoice {sheet.number}" if sheet.number else "Invoice (open, not final)"
    facts = [[_paragraph(name, _LABEL), _paragraph(value, _TEXT)] for name, value in sheet.facts]
    # A row for each line, so that even very long addresses break over pages.
    pairs = zip_longest(sheet.issuer, sheet.customer or (sheet.account,), fillvalue="")
    parties: list[list[Any]] = [
        [_paragraph("FROM", _LABEL), _paragraph("TO", _LABEL)],
        *([_paragraph(text, _TEXT) for text in pair] for pair in pairs),
    ]
    notes = [_paragraph(note, _SMALL) for note in sheet.notes]
    if sheet.digest:
        notes.append(_paragraph(f"SHA-256 of the closed invoice: {sheet.digest}", _SMALL))
    return [
        _paragraph(title, _TITLE),
        Spacer(0, 3 * mm),
        Table(facts, colWidths=(24 * mm, _WIDTH - 24 * mm), style=_PLAIN),
        Spacer(0, 6 * mm),
        Table(parties, colWidths=(_WIDTH / 2, _WIDTH / 2), style=_PLAIN),
        Spacer(0, 7 * mm),
        *_lines(sheet),
        Spacer(0, 2 * mm),
        _sums(sheet),
        Spacer(0, 7 * mm),
        *notes,
    ]


def _lines(sheet: Sheet) -> Iterator[Any]:
    rows = [_row(line) for line in (*sheet.lines, *sheet.credit_notes)]
    rows = rows or [[_paragraph("No charges in this period.", _TEXT), "", "", ""]]
    for first in range(0, len(rows), _TABLE_ROWS_MAX):
        if first:
            yield PageBreak()
        part = [[*_HEADINGS], *rows[first : first + _TABLE_ROWS_MAX]]
        yield LongTable(part, colWidths=_COLUMNS, style=_RULED, repeatRows=1)


def _row(line: SheetLine) -> list[Any]:
    # Figures have letters of one font and one line: as plain texts they cost a tenth of a paragraph.
    what = [_paragraph(line.description, _TEXT), _paragraph(line.detail, _SMALL)]
    return [what, _fitting(line.quantity), _fitting(line.unit_price), _fitting(line.amount, _AMOUNT_WIDTH, before=".")]


def _fitting(figure: str, width: float = _FIGURE_WIDTH, *, before: str = " ") -> str:
    """On two lines where one is too narrow: the number, then its unit, or dollars, then their fraction."""
    fits = stringWidth(figure, REGULAR, _TEXT.fontSize) <= width - _COLUMN_GAP
    return figure if fits else figure.replace(before, f"\n{before.strip()}", 1)


def _sums(sheet: Sheet) -> Table:
    *parts, (name, total) = sheet.sums
    rows = [[_paragraph(part, _FIGURE), _paragraph(value, _FIGURE)] for part, value in parts]
    rows.append([_paragraph(name, _TOTAL), _paragraph(f"{total} {CURRENCY}", _TOTAL)])
    return Table(rows, colWidths=(_WIDTH - 70 * mm, 70 * mm), style=_PLAIN)


def _paragraph(text: str, style: ParagraphStyle) -> Paragraph:
    return Paragraph(marked_up(text, style.fontName), style)


def _numbered(sheet: Sheet) -> Callable[..., Canvas]:
    """A canvas that keeps its pages until their number is known."""

    class Numbered(Canvas):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.setDateFormatter(lambda *_: f"D:{sheet.moment:%Y%m%d%H%M%S}Z")
            self._pages: list[dict[str, Any]] = []

        def showPage(self) -> None:
            self._pages.append(dict(self.__dict__))
            self._startPage()  # type: ignore[attr-defined]

        def save(self) -> None:
            for number, page in enumerate(self._pages, start=1):
                self.__dict__.update(page)
                _frame(self, sheet, number, len(self._pages))
                super().showPage()
            super().save()

    return Numbered


def _frame(canvas: Canvas, sheet: Sheet, number: int, pages: int) -> None:
    canvas.setStrokeColor(_RULE)
    canvas.line(_MARGIN, A4[1] - 15 * mm, A4[0] - _MARGIN, A4[1] - 15 * mm)
    canvas.line(_MARGIN, 14 * mm, A4[0] - _MARGIN, 14 * mm)
    issuer = sheet.issuer[0][:60] if sheet.issuer else ""
    for text, style, height in (
        (issuer, _SMALL, A4[1] - 13.5 * mm),
        (sheet.title, _SMALL_RIGHT, A4[1] - 13.5 * mm),
        (sheet.period, _SMALL, 9.5 * mm),
        (f"Page {number} of {pages}", _SMALL_RIGHT, 9.5 * mm),
    ):
        paragraph = _paragraph(text, style)
        paragraph.wrapOn(canvas, _WIDTH, _SMALL.leading)
        paragraph.drawOn(canvas, _MARGIN, height)


_PLAIN = TableStyle(
    [
        ("VALIGN", (0, 0), (-1, -1), "TOP"),
        ("LEFTPADDING", (0, 0), (-1, -1), 0),
        ("RIGHTPADDING", (0, 0), (-1, -1), 0),
        ("TOPPADDING", (0, 0), (-1, -1), 1),
        ("BOTTOMPADDING", (0, 0), (-1, -1), 1),
    ]
)
_RULED = TableStyle(
    [
        *_PLAIN.getCommands(),
        ("LINEBELOW", (0, 0), (-1, -1), 0.4, _RULE),
        ("LINEBELOW", (0, 0), (-1, 0), 0.8, _GREY),
        ("TOPPADDING", (0, 0), (-1, -1), 3),
        ("BOTTOMPADDING", (0, 0), (-1, -1), 3),
        ("LEFTPADDING", (1, 0), (-1, -1), _COLUMN_GAP),
        ("FONT", (1, 1), (-1, -1), REGULAR, _TEXT.fontSize, _TEXT.leading),
        ("FONT", (0, 0), (-1, 0), BOLD, _SMALL.fontSize, _SMALL.leading),
        ("TEXTCOLOR", (0, 0), (-1, 0), _GREY),
        ("ALIGN", (1, 0), (-1, -1), "RIGHT"),
    ]
)
