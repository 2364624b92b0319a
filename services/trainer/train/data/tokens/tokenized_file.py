"""A whole dataset file as token rows: chunks tokenised here or by other processes, joined in the order of the file.

Neither tokens, nor counts, nor errors depend on how many processes work. It knows no packing and no cache.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from formats.prompts.model_folder import ModelFolder
from formats.row_errors import RowErrors
from formats.row_formats import check_file
from formats.rows import Features, Format, Row, Tokens
from services.trainer.train.data.tokens.chunks import CHUNK_LINES_MAX, Chunk, ChunkResult, ChunkTokenizer, chunks_of
from services.trainer.train.data.tokens.prepare_settings import PreparationProgress, PrepareSettings
from services.trainer.train.data.tokens.row_reader import LineReader, RowReader, is_parquet
from services.trainer.train.data.tokens.token_rows import KeptRows, TokenRows
from services.trainer.train.data.tokens.tokenizing_workers import Workers

# Below it the file is done before a process of its own would have loaded its libraries.
PARALLEL_BYTES_MIN = 8 * 1024**2
CHUNK_TOKENS_MAX = 1024**2
REPORT_EVERY_S = 5.0


@dataclass(frozen=True, kw_only=True)
class TokenizedFile:
    """`rows` are of no use when there are errors."""

    format: Format | None
    sha256: str
    features: Features
    errors: RowErrors
    rows: TokenRows
    rows_per_second: float


def tokenize_file(path: Path, name: str, folder: ModelFolder, settings: PrepareSettings) -> TokenizedFile:
    """Raises OSError for a file that cannot be read, DiskFull, and Failure for a model or a setting that no row can be
    used with."""
    collected = _Collected(name, path.stat().st_size, folder, settings)
    read = _token_rows if is_parquet(path) else _lines
    sha256 = read(path, collected)
    return TokenizedFile(
        format=collected.format,
        sha256=sha256,
        features=collected.features,
        errors=collected.errors,
        rows=collected.kept.token_rows(rows_per_example=2 if collected.format == "preference" else 1),
        rows_per_second=collected.rows_per_second,
    )


class _Collected:
    """What is known of the file so far, chunk after chunk in its order."""

    def __init__(self, name: str, bytes_total: int, folder: ModelFolder, settings: PrepareSettings) -> None:
        self.settings = settings
        self.rules = settings.chunk_rules(folder)
        self.tokenizer = ChunkTokenizer(self.rules)
        self.bytes_total = bytes_total
        self.errors = RowErrors(kept_max=settings.errors_max)
        self.features = Features()
        self.kept = KeptRows(settings.directories.scratch)
        # A line is: then no tokens are needed any more.
        self.is_broken = False
        # What the first recognised row is, and the same once a row of it was sound.
        self.expected: Format | None = None
        self.format: Format | None = None
        self._name = name
        self._started_s = self._reported_s = time.perf_counter()

    @property
    def rows_per_second(self) -> float:
        return self.kept.rows / max(time.perf_counter() - self._started_s, 1e-9)

    def add(self, result: ChunkResult) -> None:
        self.expected = result.expected
        if result.sound and self.format is None and result.expected is not None:
            self.format = result.expected
            # A model that cannot be used is refused before anything that is wrong with the rows.
            self.tokenizer.tokenizer(result.expected)
        self.errors.add_all(result.errors)
        self.features.add_all(result.features)
        self.is_broken |= result.errors.count > 0
        if self.is_broken:
            # The file is refused already. Errors of its other lines are still reported, but no more tokens are made.
            # What other processes made ahead of this is dropped.
            return
        if result.refusal is not None:
            raise result.refusal
        self.errors.add_all(result.token_errors)
        if result.block is not None:
            self.kept.append(result.block)

    def report(self, bytes_read: int) -> None:
        now_s = time.perf_counter()
        if self.settings.report is None or now_s < self._reported_s + REPORT_EVERY_S:
            return
        self._reported_s = now_s
        self.settings.report(
            PreparationProgress(
                file=self._name,
                rows=self.kept.rows,
                bytes_read=bytes_read,
                bytes_total=self.bytes_total,
                rows_per_second=self.rows_per_second,
            )
        )


def _lines(path: Path, collected: _Collected) -> str:
    lines = LineReader(path, RowErrors(kept_max=collected.settings.errors_max))
    groups = chunks_of(lines)
    with contextlib.ExitStack() as stack:
        workers = _workers(stack, collected)
        # The first lines decide which format the file has; the others need to know it.
        for group in groups:
            collected.add(collected.tokenizer(_chunk(group, collected)))
            collected.report(lines.bytes_read)
            if collected.expected is not None:
                break
        chunks = (_chunk(group, collected) for group in groups)
        results = map(collected.tokenizer, chunks) if workers is None else workers.results(chunks)
        for result in results:
            collected.add(result)
            collected.report(lines.bytes_read)
    collected.errors.add_all(lines.errors)
    check_file(collected.format, collected.features, collected.errors)
    return lines.sha256


def _workers(stack: contextlib.ExitStack, collected: _Collected) -> Workers | None:
    count = collected.settings.directories.workers
    if count < 2 or collected.bytes_total < PARALLEL_BYTES_MIN:
        return None
    return stack.enter_context(Workers(count, collected.rules))


def _chunk(group: tuple[tuple[int, bytes], ...], collected: _Collected) -> Chunk:
    return Chunk(lines=group, expected=collected.expected, tokens=not collected.is_broken)


def _token_rows(path: Path, collected: _Collected) -> str:
    """Rows that are tokens already. Sending them to other processes would cost more than checking them here."""
    reader = RowReader(path, collected.settings.errors_max)
    collected.errors = reader.errors
    unknown_ids = 0
    for rows in _batches(reader):
        collected.format = "tokens"
        if reader.errors.count > unknown_ids:
            continue
        found = RowErrors(kept_max=collected.settings.errors_max)
        collected.kept.append(collected.tokenizer.block(rows, "tokens", found))
        reader.errors.add_all(found)
        unknown_ids += found.count
    check_file(reader.format, reader.features, reader.errors)
    return reader.sha256


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    tokens = 0
    for row in rows:
        batch.append(row)
        tokens += len(row.ids) if isinstance(row, Tokens) else 0
        if len(batch) == CHUNK_LINES_MAX or tokens >= CHUNK_TOKENS_MAX:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch
