"""Rows of a file grouped into the sequences that steps are made of, under a digest of rows and grouping.

It knows no step and no torch.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.trainer.train.data.packing.pack import Groups, even_groups, pack
from services.trainer.train.data.tokens.token_rows import TokenRows

SEQUENCES_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Rows grouped into sequences: packed ones, one row each, or one pair of answers each."""

    groups: Groups
    token_counts: NDArray[np.int64]
    digest: str

    @property
    def count(self) -> int:
        return len(self.groups)


def make_sequences(rows: TokenRows, *, packing: bool, max_seq_length: int, rows_digest: str | None = None) -> Sequences:
    """`rows_digest` is that of the rows where it is known already."""
    groups = _groups(rows, packing=packing, max_seq_length=max_seq_length)
    digest = hashlib.sha256(f"{SEQUENCES_VERSION}:{max_seq_length}:{rows_digest or rows.digest()}:".encode())
    for piece in groups.lengths_and_rows():
        digest.update(piece.tobytes())
    return sequences_of(groups, rows, digest.hexdigest())


def sequences_of(groups: Groups, rows: TokenRows, digest: str) -> Sequences:
    return Sequences(groups=groups, token_counts=groups.sums(rows.lengths), digest=digest)


def _groups(rows: TokenRows, *, packing: bool, max_seq_length: int) -> Groups:
    """Pairs of answers are never packed: each pair is a sequence."""
    width = rows.rows_per_example
    if packing and width == 1:
        return pack(rows.lengths, max_seq_length)
    return even_groups(rows.count, width)
