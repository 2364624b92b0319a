"""From a dataset file to sequences of tokens: read, render, tokenise, pack.

Analysis, quote and training all come through here, so their counts cannot disagree. What was made of a large file
before is taken from the cache (token_cache.py). It knows no torch.
"""

from dataclasses import dataclass
from pathlib import Path

from formats.prompts.model_folder import ModelFolder
from formats.row_errors import RowError
from formats.rows import Features, Format
from services.trainer.train.data.packing.sequences import Sequences, make_sequences
from services.trainer.train.data.preparation.token_cache import TokenCache, cache_key, prepared_file
from services.trainer.train.data.tokens.prepare_settings import PrepareSettings
from services.trainer.train.data.tokens.token_rows import TokenRows
from services.trainer.train.data.tokens.tokenized_file import TokenizedFile, tokenize_file
from services.trainer.train.disk.durable import DiskFull, sha256_file
from services.trainer.train.settings.failures import Failure, platform_failure, user_failure

# A smaller file is made anew in less time than its cached tokens take to be written and synced.
CACHED_FILE_BYTES_MIN = 4 * 1024**2


@dataclass(frozen=True, kw_only=True)
class DatasetRefusal:
    """Broken rows of one file: the first ones and how many there are."""

    file: str
    errors: tuple[RowError, ...]
    error_count: int


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """`rows_per_second` is how fast the file was read, rendered and tokenised."""

    format: Format
    sha256: str
    features: Features
    rows: TokenRows
    sequences: Sequences
    rows_per_second: float


def prepare_dataset(
    path: Path, name: str, folder: ModelFolder, settings: PrepareSettings, *, pack_rows: bool
) -> Dataset | DatasetRefusal:
    """`name` is "train" or "validation"; the latter is never packed. Raises Failure for a model that cannot be used."""
    packing = pack_rows and settings.packing
    try:
        if settings.directories.cache is not None and path.stat().st_size >= CACHED_FILE_BYTES_MIN:
            return _through_cache(settings.directories.cache, path, name, folder, settings, packing=packing)
        made = _tokenized(path, name, folder, settings)
    except DiskFull as error:
        message = f"the disk is full: {error.filename} could not be written while the {name} file was prepared"
        raise platform_failure("TRAINING_FAILED", message, {"cause": "disk_full"}) from error
    except OSError as error:
        raise unreadable(name, error) from error
    if isinstance(made, DatasetRefusal):
        return made
    return _dataset(made, make_sequences(made.rows, packing=packing, max_seq_length=settings.max_seq_length))


def unreadable(name: str, error: OSError) -> Failure:
    # Arrow's errors about damaged files have no words of the system.
    why = error.strerror or "it is damaged"
    return user_failure("TRAINING_INPUT_INVALID", f"the {name} file cannot be read: {why}")


def _through_cache(
    cache_folder: Path, path: Path, name: str, folder: ModelFolder, settings: PrepareSettings, *, packing: bool
) -> Dataset | DatasetRefusal:
    """A process that comes while another one prepares the same file waits for it and takes the result."""
    cache = TokenCache(cache_folder, settings.directories.cache_bytes_max)
    key = cache_key(sha256_file(path), folder, settings)
    with cache.locked(key):
        prepared = cache.load(key)
        if prepared is None:
            made = _tokenized(path, name, folder, settings)
            if isinstance(made, DatasetRefusal):
                return made
            prepared = prepared_file(made, settings.max_seq_length)
            # A file that changed while it was read has another key.
            if key == cache_key(made.sha256, folder, settings):
                cache.keep(key, prepared)
    rows = prepared.file.rows
    if packing or rows.rows_per_example > 1:
        return _dataset(prepared.file, prepared.packed)
    plain = make_sequences(
        rows, packing=False, max_seq_length=settings.max_seq_length, rows_digest=prepared.rows_digest
    )
    return _dataset(prepared.file, plain)


def _tokenized(path: Path, name: str, folder: ModelFolder, settings: PrepareSettings) -> TokenizedFile | DatasetRefusal:
    made = tokenize_file(path, name, folder, settings)
    if made.errors.count or made.format is None:
        return DatasetRefusal(file=name, errors=tuple(made.errors.kept), error_count=made.errors.count)
    if not made.rows.count:
        raise user_failure(
            "TRAINING_INPUT_INVALID",
            f"no row of the {name} file has a token to train on: every answer is masked, has weight 0, was the same "
            "as the one it is compared with, or was cut off at "
            f"{settings.max_seq_length} tokens (first row: line {made.rows.skipped_line}; longest row: "
            f"{made.rows.longest_row_tokens} tokens)",
        )
    return made


def _dataset(file: TokenizedFile, sequences: Sequences) -> Dataset:
    assert file.format is not None
    return Dataset(
        format=file.format,
        sha256=file.sha256,
        features=file.features,
        rows=file.rows,
        sequences=sequences,
        rows_per_second=file.rows_per_second,
    )
