"""Who sends an invoice and who gets it, what stands on every invoice, and how large one may be. Plain values."""

from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, kw_only=True)
class Party:
    """A name and address; all empty where nothing was said."""

    legal_name: str = ""
    address_lines: tuple[str, ...] = ()
    tax_id: str = ""
    email: str = ""


NOBODY = Party()


@dataclass(frozen=True, kw_only=True)
class InvoiceTerms:
    """What stands on every invoice, and the limits of one. `settling` is how long after a month's end clocks that are
    behind may still book into it."""

    issuer: Party
    tax_note: str
    settling: timedelta
    lines_max: int
    names_max: int
    names_per_line_max: int
    names_scan_max: int
