"""The shipped price books as they are once the newest is in force, which tests at fixed times and at any date need."""

from pathlib import Path

from services.billing.config import BillingSettings

SHIPPED = BillingSettings.model_fields["price_books_dir"].default
# The day on which default-2026-2 takes over from default-2026-1: as shipped, and for tests.
_SHIPPED_TAKEOVER, _TAKEOVER = "2026-12-01", "2026-11-01"


def book_text(version: str) -> str:
    text = (SHIPPED / f"{version}.yaml").read_text(encoding="utf-8")
    assert version.startswith("together-") or _SHIPPED_TAKEOVER in text
    return text.replace(_SHIPPED_TAKEOVER, _TAKEOVER)


def write_books(folder: Path) -> Path:
    """All of them, into a folder that is made for them."""
    folder.mkdir()
    for path in SHIPPED.glob("*.yaml"):
        (folder / path.name).write_text(book_text(path.stem), encoding="utf-8")
    return folder
