"""Questions with an answer to another question: by them a method sees how far the policy has moved from its reference.

Which answer a question gets is a function of the file alone: the rows stand in a circle in an order drawn by a fixed
seed, and each takes the answer of the next one. So it depends on no step, no micro-batch, no packing and no process.
The rows are put together when they are laid out; memory holds a few numbers for each. It knows no model.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.trainer.train.data.packing.shuffle import epoch_order
from services.trainer.train.data.tokens.token_rows import TokenRows

_SEED = 0


@dataclass(frozen=True, kw_only=True)
class MismatchedRows(TokenRows):
    """Row i is the question of row i in the file and the answer of row `answered_by[i]`; `ids` and `labelled` are the
    file's. An answer begins with the first token that is learned, at `answers_at[i]` in its row."""

    source: TokenRows
    answered_by: NDArray[np.int64]
    answers_at: NDArray[np.int64]

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        asked, answer = int(self.answers_at[index]), int(self.answered_by[index])
        begins = int(self.answers_at[answer])
        length = int(self.offsets[index + 1] - self.offsets[index])
        ids, labelled = self.source.row(index)
        other_ids, other_labelled = self.source.row(answer)
        return (
            np.concatenate([ids[:asked], other_ids[begins:]])[:length],
            np.concatenate([labelled[:asked], other_labelled[begins:]])[:length],
        )


def mismatched_rows(rows: TokenRows, max_seq_length: int) -> MismatchedRows:
    """Rows longer than `max_seq_length` lose their end, as those of the file do."""
    order = epoch_order(_SEED, 0, rows.count)
    answered_by = np.empty(rows.count, np.int64)
    answered_by[order] = np.roll(order, -1)
    answers_at = np.fromiter((rows.row(index)[1].argmax() for index in range(rows.count)), np.int64, rows.count)
    lengths = np.minimum(answers_at + (rows.lengths - answers_at)[answered_by], max_seq_length)
    return MismatchedRows(
        ids=rows.ids,
        labelled=rows.labelled,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        rows=rows.rows,
        truncated_rows=rows.truncated_rows,
        skipped_rows=rows.skipped_rows,
        longest_row_tokens=rows.longest_row_tokens,
        source=rows,
        answered_by=answered_by,
        answers_at=answers_at,
    )
