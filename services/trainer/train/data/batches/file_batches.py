"""All rows of a file as micro-batches, for evaluations and for the reference of preferences.

Each micro-batch is laid out when its turn comes. So memory holds a number for each row and one micro-batch, however
large the file is. It knows no step and no model.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from services.trainer.train.data.batches.micro_batch import Layout, MicroBatch, group_ends, lay_out, without_labels
from services.trainer.train.data.tokens.token_rows import TokenRows
from services.trainer.train.runtime.process_group import ALONE, Group


class FileBatches:
    """This process's part of a file, longest rows first. All processes get equally many micro-batches. A process that
    has fewer computes some without labels, because sharded weights are gathered by all at once."""

    def __init__(self, rows: TokenRows, *, tokens_max: int, layout: Layout, device: str, group: Group = ALONE) -> None:
        self._rows = rows
        self._layout = layout
        self._device = device
        lengths = _example_lengths(rows)
        order = np.argsort(-lengths, kind="stable")
        # Neighbours in this order are of like length, so dealing them out in turn is even.
        ends = [
            group_ends(lengths[order[rank :: group.size]], tokens_max=tokens_max, layout=layout)
            for rank in range(group.size)
        ]
        self._order = order[group.rank :: group.size]
        self._ends = ends[group.rank]
        self._shortest = int(order[-1])
        self._count = max(len(own) for own in ends) - 1
        # Whether a smaller budget could make any micro-batch of any process smaller.
        self.is_divisible = any((np.diff(own) > 1).any() for own in ends)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[MicroBatch]:
        for start, end in zip(self._ends, self._ends[1:], strict=False):
            yield self._lay(self._order[start:end])
        for _ in range(self._count - len(self._ends) + 1):
            yield self.idle()

    def idle(self) -> MicroBatch:
        """The smallest micro-batch, with nothing to learn."""
        return without_labels(self._lay(np.array([self._shortest])))

    def _lay(self, examples: NDArray[np.int64]) -> MicroBatch:
        width = self._rows.rows_per_example
        return lay_out(self._rows, (examples * width).tolist(), layout=self._layout, device=self._device, width=width)


def _example_lengths(rows: TokenRows) -> NDArray[np.int64]:
    """Rows that lie side by side are counted as long as the longest of them."""
    width = rows.rows_per_example
    longest: NDArray[np.int64] = rows.lengths.reshape(-1, width).max(axis=1)
    return width * longest
