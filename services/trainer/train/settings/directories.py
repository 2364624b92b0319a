"""Where and with how many processes datasets are prepared, which no token depends on. It knows no row and no model."""

from dataclasses import dataclass
from pathlib import Path

from services.trainer.train.settings.json_reader import Reader

FOLDER_LENGTH_MAX = 4096
WORKERS_MAX = 256
CACHE_BYTES_DEFAULT = 20 * 1024**3


@dataclass(frozen=True, kw_only=True)
class Place:
    """`scratch`: where tokens lie that are too many for memory, None for the system's folder for temporary files; `cache`: where
    prepared files are kept for the next who needs them, None for nowhere; `workers`: processes that render and tokenise a large file."""

    scratch: Path | None = None
    cache: Path | None = None
    cache_bytes_max: int = CACHE_BYTES_DEFAULT
    workers: int = 1


def read_place(reader: Reader) -> Place:
    """The object `place` {scratch, cache, cache_bytes_max, workers}, of which nothing is required."""
    asked = reader.child("place", {})
    scratch, cache = (asked.optional_text(name, FOLDER_LENGTH_MAX) for name in ("scratch", "cache"))
    place = Place(
        scratch=None if scratch is None else Path(scratch),
        cache=None if cache is None else Path(cache),
        cache_bytes_max=asked.integer("cache_bytes_max", 0, 2**63 - 1, CACHE_BYTES_DEFAULT),
        workers=asked.integer("workers", 1, WORKERS_MAX, 1),
    )
    asked.finish()
    return place
