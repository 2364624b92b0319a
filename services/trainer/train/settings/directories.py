"""The directories in which datasets are prepared, and with how many processes. No token depends on them."""

from dataclasses import dataclass
from pathlib import Path

from services.trainer.train.settings.json_reader import Reader

FOLDER_LENGTH_MAX = 4096
WORKERS_MAX = 256
CACHE_BYTES_DEFAULT = 20 * 1024**3


@dataclass(frozen=True, kw_only=True)
class Directories:
    """Tokens that are too many for memory lie in `scratch`; None is the system's folder for temporary files. Prepared
    files are kept in `cache` for the next run that needs them; None keeps none. So many `workers` render and tokenise a
    large file."""

    scratch: Path | None = None
    cache: Path | None = None
    cache_bytes_max: int = CACHE_BYTES_DEFAULT
    workers: int = 1


def read_directories(reader: Reader) -> Directories:
    """Reads the object `directories` {scratch, cache, cache_bytes_max, workers}. Every field has a default."""
    asked = reader.child("directories", {})
    scratch, cache = (asked.optional_text(name, FOLDER_LENGTH_MAX) for name in ("scratch", "cache"))
    directories = Directories(
        scratch=None if scratch is None else Path(scratch),
        cache=None if cache is None else Path(cache),
        cache_bytes_max=asked.integer("cache_bytes_max", 0, 2**63 - 1, CACHE_BYTES_DEFAULT),
        workers=asked.integer("workers", 1, WORKERS_MAX, 1),
    )
    asked.finish()
    return directories
