"""Tokenises some lines of a dataset: the unit of work that any process does with the same result.

It knows neither the file around the lines nor the other processes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date

from formats.line_parser import LineParser
from formats.prompts.model_folder import ModelFolder
from formats.row_errors import RowErrors
from formats.rows import Features, Format, Preference, Row
from services.trainer.train.data.tokens.preference_pairs import pair_block
from services.trainer.train.data.tokens.row_tokenizer import RowTokenizer
from services.trainer.train.data.tokens.template import ChatTemplate, check_template
from services.trainer.train.data.tokens.token_rows import TokenBlock
from services.trainer.train.settings.failures import Failure
from services.trainer.train.settings.spec import TrainOnInputs

# Enough for a process to be worth its message, few enough for bounded memory; a line alone may be longer.
CHUNK_LINES_MAX = 1024
CHUNK_BYTES_MAX = 1024**2


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Numbered lines in succession. `expected` is the format of the file, None as long as no line was recognised.
    Without `tokens` the lines are only checked."""

    lines: tuple[tuple[int, bytes], ...]
    expected: Format | None
    tokens: bool = True


@dataclass(frozen=True, kw_only=True)
class ChunkResult:
    """`expected` is the chunk's, or the format of its first recognised line. `sound` says that a row of it can be used.
    There is no block when a line is broken. `refusal` says why no row of such a file can be trained on."""

    expected: Format | None
    sound: bool
    errors: RowErrors
    features: Features
    block: TokenBlock | None = None
    token_errors: RowErrors = field(default_factory=RowErrors)
    refusal: Failure | None = None


def chunks_of(lines: Iterable[tuple[int, bytes]]) -> Iterator[tuple[tuple[int, bytes], ...]]:
    """Chunks of up to CHUNK_LINES_MAX lines and CHUNK_BYTES_MAX bytes; the line that exceeds the bytes is still part of
    its chunk."""
    chunk: list[tuple[int, bytes]] = []
    size_bytes = 0
    for number, line in lines:
        chunk.append((number, line))
        size_bytes += len(line)
        if len(chunk) == CHUNK_LINES_MAX or size_bytes >= CHUNK_BYTES_MAX:
            yield tuple(chunk)
            chunk, size_bytes = [], 0
    if chunk:
        yield tuple(chunk)


@dataclass(frozen=True, kw_only=True)
class ChunkRules:
    """What decides the tokens of a chunk. Other processes get it as it is."""

    folder: ModelFolder
    max_seq_length: int
    train_on_inputs: TrainOnInputs
    template_date: str
    errors_max: int


class ChunkTokenizer:
    """Gives the same result for the same chunk, whatever came before it."""

    def __init__(self, rules: ChunkRules) -> None:
        self._rules = rules
        self._tokenizers: dict[Format, RowTokenizer] = {}

    def __call__(self, chunk: Chunk) -> ChunkResult:
        parser = LineParser(self._rules.errors_max, chunk.expected)
        rows = [row for number, line in chunk.lines if (row := parser.row(number, line)) is not None]
        result = ChunkResult(expected=parser.expected, sound=bool(rows), errors=parser.errors, features=parser.features)
        if not rows or parser.errors.count or parser.expected is None or not chunk.tokens:
            return result
        try:
            return self._tokenized(result, rows, parser.expected)
        except Failure as refusal:
            return replace(result, refusal=refusal)

    def block(self, rows: Sequence[Row], kind: Format, errors: RowErrors) -> TokenBlock:
        """Raises Failure when no row of such a file can be trained on."""
        length_max = self._rules.max_seq_length
        if kind == "preference":
            pairs = [row for row in rows if isinstance(row, Preference)]
            return pair_block(self.tokenizer(kind), pairs, length_max, errors)
        return self.tokenizer(kind).block(rows, length_max, errors)

    def tokenizer(self, kind: Format) -> RowTokenizer:
        """For rows of one format. Raises Failure for a model whose template cannot be used with it."""
        if kind not in self._tokenizers:
            self._tokenizers[kind] = _row_tokenizer(kind, self._rules)
        return self._tokenizers[kind]

    def _tokenized(self, result: ChunkResult, rows: Sequence[Row], kind: Format) -> ChunkResult:
        errors = RowErrors(kept_max=self._rules.errors_max)
        block = self.block(rows, kind, errors)
        return replace(result, block=block, token_errors=errors)


def _row_tokenizer(kind: Format, rules: ChunkRules) -> RowTokenizer:
    template = None
    # A base without a template takes feedback on plain text.
    if kind in ("conversation", "preference") or (kind == "feedback" and rules.folder.template_source is not None):
        template = ChatTemplate.of(rules.folder, date.fromisoformat(rules.template_date))
        check_template(template)
    # Answers alone are compared and judged, whatever the setting for inputs is.
    answers_only = kind in ("preference", "feedback")
    return RowTokenizer(rules.folder, template, False if answers_only else rules.train_on_inputs)
