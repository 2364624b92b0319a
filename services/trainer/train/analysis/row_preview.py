"""Sampled rows of a dataset, token by token, as training would see them: the same reader, template, tokenizer and cut.

It knows no packing and no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from formats.prompts.model_folder import ModelFolder
from formats.rows import UNLABELLED, Features, Format, Preference, Row
from services.trainer.train.data.preparation.prepare import DatasetRefusal, unreadable
from services.trainer.train.data.tokens.chunks import ChunkTokenizer
from services.trainer.train.data.tokens.preference_pairs import answers_of
from services.trainer.train.data.tokens.prepare_settings import PrepareSettings
from services.trainer.train.data.tokens.row_reader import RowReader
from services.trainer.train.data.tokens.token_rows import TokenRow

PREVIEW_ROWS_DEFAULT, PREVIEW_ROWS_MAX = 5, 50
PREVIEW_TOKENS_DEFAULT, PREVIEW_TOKENS_MAX = 1024, 8192
# Of all rows together, which share it alike: what is shown has to fit into one answer of an agent and one message.
PREVIEW_TOKENS_IN_ALL_MAX = 32_768
TRUNCATED_TEXT_TOKENS_MAX = 128


@dataclass(frozen=True, kw_only=True)
class PreviewSettings:
    rows_max: int
    tokens_max: int


@dataclass(frozen=True, kw_only=True)
class PreviewRow:
    """`part` is `row`, `preferred` or `non_preferred`. `labels` are ids or UNLABELLED; spans are half-open ranges of
    tokens. The lists hold at most as many tokens as were asked for; the counts cover all."""

    line: int
    part: str
    input_ids: list[int]
    labels: list[int]
    tokens: list[str]
    trained_spans: list[tuple[int, int]]
    token_count: int
    trained_token_count: int
    truncated_token_count: int
    truncated_text: str
    weight: float
    skipped: bool


@dataclass(frozen=True, kw_only=True)
class Preview:
    format: Format
    features: Features
    rows: int
    max_seq_length: int
    sampled: list[PreviewRow]


def preview_dataset(
    path: Path, folder: ModelFolder, settings: PrepareSettings, shown: PreviewSettings
) -> Preview | DatasetRefusal:
    """Rows at even distances over the file, the first one among them. Raises Failure for a model that cannot be
    used."""
    reader = RowReader(path, settings.errors_max)
    try:
        count = sum(1 for _ in reader)
        if reader.errors.count or reader.format is None:
            return _refusal(reader)
        # The file is read twice instead of keeping all rows: it may be large.
        chosen = {number * count // shown.rows_max for number in range(shown.rows_max)}
        sample = list(compress(RowReader(path), (number in chosen for number in range(count))))
    except OSError as error:
        raise unreadable("train", error) from error
    tokenizer = ChunkTokenizer(settings.chunk_rules(folder)).tokenizer(reader.format)
    parts = list(_parts(sample))
    tokenized = tokenizer.tokenized([row for _, row in parts], reader.errors)
    rows = list(tokenized)
    if reader.errors.count:
        return _refusal(reader)
    tokens_max = min(shown.tokens_max, PREVIEW_TOKENS_IN_ALL_MAX // max(len(parts), 1))
    return Preview(
        format=reader.format,
        features=reader.features,
        rows=count,
        max_seq_length=settings.max_seq_length,
        sampled=[
            _shown(part, row, folder.tokenizer, settings.max_seq_length, tokens_max)
            for (part, _), row in zip(parts, rows, strict=True)
        ],
    )


def _parts(sample: list[Row]) -> Iterator[tuple[str, Row]]:
    for row in sample:
        if isinstance(row, Preference):
            yield from zip(("preferred", "non_preferred"), answers_of(row), strict=True)
        else:
            yield "row", row


def _shown(part: str, row: TokenRow, tokenizer: Tokenizer, length_max: int, tokens_max: int) -> PreviewRow:
    cut = row.cut(length_max)
    ids, labelled = cut.ids[:tokens_max], cut.labelled[:tokens_max]
    lost = row.ids[length_max:]
    return PreviewRow(
        line=row.line,
        part=part,
        input_ids=ids.tolist(),
        labels=np.where(labelled, ids, UNLABELLED).tolist(),
        tokens=[tokenizer.decode([token], skip_special_tokens=False) for token in ids.tolist()],
        trained_spans=_spans(labelled),
        token_count=len(cut.ids),
        trained_token_count=int(cut.labelled.sum()),
        truncated_token_count=len(lost),
        truncated_text=tokenizer.decode(lost[:TRUNCATED_TEXT_TOKENS_MAX].tolist(), skip_special_tokens=False),
        weight=row.weight,
        skipped=not cut.is_trained,
    )


def _spans(labelled: NDArray[np.bool_]) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], labelled, [False]]).astype(np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _refusal(reader: RowReader) -> DatasetRefusal:
    return DatasetRefusal(file="train", errors=tuple(reader.errors.kept), error_count=reader.errors.count)
