"""The shipped price books as they are once a version is in force, which tests at fixed times and at any date need."""

from pathlib import Path

from services.billing.config import BillingSettings

SHIPPED = BillingSettings.model_fields["price_books_dir"].default
# The day on which default-2026-2 takes over from default-2026-1: as shipped, and for tests.
_SHIPPED_TAKEOVER, _TAKEOVER = "2026-12-01", "2026-11-01"
# The same of default-2026-3, which most tests leave out, and which prices answers with thumbs.
_NEXT, _SHIPPED_NEXT_TAKEOVER, _BEFORE = "default-2026-3", "2026-12-02", "2026-10-01"


def book_text(version: str) -> str:
    """With default-2026-2 as the newest."""
    text = (SHIPPED / f"{version}.yaml").read_text(encoding="utf-8")
    assert version.startswith("together-") or _SHIPPED_TAKEOVER in text
    return text.replace(f"effective_until: {_SHIPPED_NEXT_TAKEOVER}\n", "").replace(_SHIPPED_TAKEOVER, _TAKEOVER)


def write_books(folder: Path) -> Path:
    """All of them up to default-2026-2, into a folder that is made for them."""
    folder.mkdir()
    for path in SHIPPED.glob("*.yaml"):
        if path.stem != _NEXT:
            (folder / path.name).write_text(book_text(path.stem), encoding="utf-8")
    return folder


def write_next_books(folder: Path) -> Path:
    """All of them, with default-2026-3 in force."""
    folder.mkdir()
    for path in SHIPPED.glob("*.yaml"):
        text = path.read_text(encoding="utf-8").replace(_SHIPPED_TAKEOVER, _BEFORE)
        (folder / path.name).write_text(text.replace(_SHIPPED_NEXT_TAKEOVER, _TAKEOVER), encoding="utf-8")
    return folder
