"""An invoice as one HTML page that needs nothing else: styles inside, made to be printed, every text escaped."""

from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template

from services.billing.invoices.documents.sheet import CURRENCY, Sheet

_TEMPLATE = Path(__file__).parent / "page.html.j2"


def to_html(sheet: Sheet) -> bytes:
    return _template().render(sheet=sheet, currency=CURRENCY).encode()


@lru_cache(maxsize=1)
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
