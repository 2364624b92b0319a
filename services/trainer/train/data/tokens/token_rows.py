"""Token rows: ids with a mark on every token that carries loss, end to end and in bounded memory.

It knows no text and no tokenizer.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.trainer.train.disk.spill import SpilledArray

DIGEST_PIECE_BYTES = 16 * 1024**2


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Kept rows, end to end: row i is `ids[offsets[i]:offsets[i + 1]]`, and `labelled` says which tokens carry loss.
    The first token of a row is never predicted, so it is never labelled. `weights`, one a row, multiply the row's loss;
    None when all of them are 1; of feedback it is negative for an answer with thumbs down. Of preferences
    (preference_pairs.py) two rows make an example; `rows` and the fields after it count examples. `truncated_line` and
    `skipped_line` are the lines of the first such row in the file, from 1; 0 when there is none."""

    ids: NDArray[np.int32]
    labelled: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    weights: NDArray[np.float32] | None = None
    rows_per_example: int = 1
    rows: int
    truncated_rows: int
    skipped_rows: int
    longest_row_tokens: int
    truncated_line: int = 0
    skipped_line: int = 0

    @property
    def count(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    @property
    def token_count(self) -> int:
        return int(self.offsets[-1])

    @property
    def labelled_count(self) -> int:
        return int(self.labelled.sum())

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        return self.ids[start:end], self.labelled[start:end]

    def digest(self) -> str:
        digest = hashlib.sha256()
        for part in (self.ids, self.labelled, self.offsets):
            flat = np.ascontiguousarray(part).view(np.uint8)
            for start in range(0, len(flat), DIGEST_PIECE_BYTES):
                digest.update(flat[start : start + DIGEST_PIECE_BYTES].data)
        if self.weights is not None:
            digest.update(b"weights")
            digest.update(self.weights.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One row, whole or cut."""

    line: int
    ids: NDArray[np.int32]
    labelled: NDArray[np.bool_]
    weight: float

    @property
    def is_trained(self) -> bool:
        return self.weight != 0 and bool(self.labelled.any())

    def cut(self, length: int) -> "TokenRow":
        """The beginning, of at most `length` tokens, as it is trained."""
        labelled = self.labelled[:length].copy()
        labelled[:1] = False
        return TokenRow(line=self.line, ids=self.ids[:length], labelled=labelled, weight=self.weight)


@dataclass(frozen=True, kw_only=True)
class TokenBlock:
    """Some rows in succession as they are trained: those that are kept end to end, `lengths` and `weights` one a row,
    and what was counted of all of them, in examples as in TokenRows."""

    ids: NDArray[np.int32]
    labelled: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    weights: NDArray[np.float32]
    rows: int
    truncated_rows: int
    skipped_rows: int
    longest_row_tokens: int
    truncated_line: int
    skipped_line: int


def token_block(
    kept: Iterable[TokenRow], *, rows: int, truncated: Sequence[int], skipped: Sequence[int], longest_row_tokens: int
) -> TokenBlock:
    """`truncated` and `skipped` are the lines of such rows, in their order."""
    cut = list(kept)
    return TokenBlock(
        ids=np.concatenate([np.zeros(0, np.int32), *(row.ids for row in cut)]),
        labelled=np.concatenate([np.zeros(0, np.bool_), *(row.labelled for row in cut)]),
        lengths=np.array([len(row.ids) for row in cut], np.int64),
        weights=np.array([row.weight for row in cut], np.float32),
        rows=rows,
        truncated_rows=len(truncated),
        skipped_rows=len(skipped),
        longest_row_tokens=longest_row_tokens,
        truncated_line=truncated[0] if truncated else 0,
        skipped_line=skipped[0] if skipped else 0,
    )


class KeptRows:
    """Blocks end to end, collected in bounded memory: what is long goes to files without a name in the folder
    `scratch`."""

    def __init__(self, scratch: Path | None) -> None:
        self._ids = SpilledArray(np.int32, scratch)
        self._labelled = SpilledArray(np.bool_, scratch)
        self._lengths = SpilledArray(np.int64, scratch)
        self._weights = SpilledArray(np.float32, scratch)
        self.rows = self._truncated = self._skipped = self._longest = 0
        self._truncated_line = self._skipped_line = 0

    def append(self, block: TokenBlock) -> None:
        self._ids.append(block.ids)
        self._labelled.append(block.labelled)
        self._lengths.append(block.lengths)
        self._weights.append(block.weights)
        self.rows += block.rows
        self._truncated += block.truncated_rows
        self._skipped += block.skipped_rows
        self._longest = max(self._longest, block.longest_row_tokens)
        # Blocks come in the order of the file, so what an earlier one found stands.
        self._truncated_line = self._truncated_line or block.truncated_line
        self._skipped_line = self._skipped_line or block.skipped_line

    def token_rows(self, rows_per_example: int = 1) -> TokenRows:
        """All collected rows. Call it once."""
        lengths, weights = self._lengths.whole(), self._weights.whole()
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return TokenRows(
            ids=self._ids.whole(),
            labelled=self._labelled.whole(),
            offsets=offsets,
            weights=None if (weights == 1).all() else weights,
            rows_per_example=rows_per_example,
            rows=self.rows,
            truncated_rows=self._truncated,
            skipped_rows=self._skipped,
            longest_row_tokens=self._longest,
            truncated_line=self._truncated_line,
            skipped_line=self._skipped_line,
        )
