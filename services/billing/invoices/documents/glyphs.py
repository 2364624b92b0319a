"""Which font can show which letters. Letters that no font has become a visible mark instead of failing the document.

DejaVu Sans lies beside this file and is embedded. Chinese, Japanese and Korean letters are named by the standard fonts
of PDF for them, which readers bring along: embedding such a font would add ten megabytes to every image.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from xml.sax.saxutils import escape

from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.cidfonts import UnicodeCIDFont
from reportlab.pdfbase.ttfonts import TTFont

REGULAR, BOLD = "DejaVuSans", "DejaVuSans-Bold"
_CHINESE, _KOREAN = "STSong-Light", "HYSMyeongJo-Medium"
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_FONTS = Path(__file__).parent / "fonts"
# Blocks of the basic plane: Hangul; then radicals, kana, ideographs, compatibility and full-width forms.
_KOREAN_BLOCKS = ((0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7A3))
_CHINESE_BLOCKS = ((0x2E80, 0x312F), (0x3190, 0x9FFF), (0xF900, 0xFAFF), (0xFE30, 0xFE4F), (0xFF00, 0xFFEF))


@lru_cache(maxsize=1)
def load_fonts() -> None:
    """Makes the fonts known to the library; once per process, and before any text is measured."""
    for name in (REGULAR, BOLD):
        pdfmetrics.registerFont(TTFont(name, str(_FONTS / f"{name}.ttf")))
    for name in (_CHINESE, _KOREAN):
        pdfmetrics.registerFont(UnicodeCIDFont(name))


def marked_up(text: str, font: str = REGULAR) -> str:
    """Paragraph markup: escaped, with runs of letters that `font` lacks in a font that has them."""
    load_fonts()
    if _letters(font).issuperset(map(ord, text)):
        return escape(text)
    return "".join(
        escape(run) if chosen == font else f'<font name="{chosen}">{escape(run)}</font>'
        for chosen, run in _runs(text, font)
    )


def _runs(text: str, font: str) -> Iterator[tuple[str, str]]:
    placed = (_place(letter, font) for letter in text)
    for chosen, letters in groupby(placed, key=lambda pair: pair[0]):
        yield chosen, "".join(letter for _, letter in letters)


def _place(letter: str, font: str) -> tuple[str, str]:
    code = ord(letter)
    if code in _letters(font):
        return font, letter
    if any(first <= code <= last for first, last in _KOREAN_BLOCKS):
        return _KOREAN, letter
    if any(first <= code <= last for first, last in _CHINESE_BLOCKS):
        return _CHINESE, letter
    return font, _UNKNOWN


@lru_cache(maxsize=2)
def _letters(font: str) -> frozenset[int]:
    loaded = pdfmetrics.getFont(font)
    assert isinstance(loaded, TTFont)
    # Beyond the basic plane the library writes a text layer that readers cannot search or copy.
    return frozenset(code for code in loaded.face.charToGlyph if code <= 0xFFFF)
