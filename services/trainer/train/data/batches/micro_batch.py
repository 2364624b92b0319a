"""Lays the rows of a step out as tensors, in one of two ways that compute the same sums.

`padded` (CPU): rows of like length side by side, padded at the right. Under causal attention no real token can see a
pad behind it, so no mask is needed and nothing leaks. A token budget bounds the padding and the memory.

`packed` (CUDA): rows end to end in one line whose positions start anew with every row, which is what variable-length
attention kernels take. Models whose rows see each other there (modeling/row_isolation.py) get padded ones.

Rows of a step are one batch in arithmetic: the loss is a sum over its labelled tokens, however they are laid out. It
knows no model.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from services.trainer.train.data.tokens.token_rows import TokenRows

Layout = Literal["padded", "packed"]
PAD_ID = 0


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """`input_ids` are [lines, length]; `position_ids` is None for padded lines. `rows` are row indices in the order in
    which they lie here. Labels are given by their position, so that nobody has to ask the device where they are: label
    i is the token `label_ids[i]`, it follows the token at `label_places[i]` of the flattened lines and belongs to row
    number `label_rows[i]` of `rows`; all int64 [labelled]. `row_weights` float32 [rows] multiply the loss of each row's
    labels; None when all weigh 1. Packed lines only: `row_ends` int32 [rows + 1] are where rows meet, from 0 on, and
    `row_numbers` int64 [1, length] say which row a token is in, where a line has more than one."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    rows: tuple[int, ...]
    labelled: int
    label_ids: torch.Tensor
    label_places: torch.Tensor
    label_rows: torch.Tensor
    label_counts: torch.Tensor
    row_weights: torch.Tensor | None = None
    row_ends: torch.Tensor | None = None
    row_numbers: torch.Tensor | None = None
    longest_row_tokens: int = 0
    # Padded lines only: the tokens of each, where some of them are shorter than the longest.
    line_tokens: tuple[int, ...] | None = None

    @property
    def tokens(self) -> int:
        """Pads not counted."""
        return self.input_ids.numel() if self.line_tokens is None else sum(self.line_tokens)

    def real_tokens(self) -> torch.Tensor | None:
        """Float32 [flattened lines], 1 for tokens and 0 for pads; None without pads."""
        if self.line_tokens is None:
            return None
        places = np.arange(self.input_ids.shape[-1])[None] < np.array(self.line_tokens)[:, None]
        return _on(str(self.input_ids.device), places.astype(np.float32).reshape(-1))

    @property
    def label_weights(self) -> torch.Tensor | None:
        """[labelled]."""
        return None if self.row_weights is None else self.row_weights.index_select(0, self.label_rows)


def layout_for(device: str, *, padded: bool = False) -> Layout:
    """`padded` says that rows must not be packed (modeling/row_isolation.py)."""
    return "packed" if device.startswith("cuda") and not padded else "padded"


def micro_batches(
    rows: TokenRows, indices: Sequence[int], *, tokens_max: int, layout: Layout, device: str, width: int = 1
) -> list[MicroBatch]:
    """With a `width` of 2 an index stands for its row and the next one, which lie side by side in one micro-batch."""
    groups = row_groups(rows, indices, tokens_max=tokens_max, layout=layout, width=width)
    return [lay_out(rows, group, layout=layout, device=device, width=width) for group in groups]


def lay_out(rows: TokenRows, group: Sequence[int], *, layout: Layout, device: str, width: int = 1) -> MicroBatch:
    """One micro-batch, its rows in the given order."""
    lay = _padded if layout == "padded" else _packed
    return lay(rows, [first + number for first in group for number in range(width)], device)


def row_groups(
    rows: TokenRows, indices: Sequence[int], *, tokens_max: int, layout: Layout, width: int = 1
) -> list[list[int]]:
    """Longest rows first, divided as `group_ends` says."""
    lengths = row_lengths(rows, indices, width)
    ordered = sorted(lengths, key=lambda index: (-lengths[index], index))
    costs = np.array([lengths[index] for index in ordered], np.int64)
    ends = group_ends(costs, tokens_max=tokens_max, layout=layout)
    return [ordered[start:end] for start, end in itertools.pairwise(ends)]


def group_ends(lengths: NDArray[np.int64], *, tokens_max: int, layout: Layout) -> list[int]:
    """Where micro-batches meet, from 0 on, in a line of lengths that do not grow: each holds at most `tokens_max`
    tokens with its padding, but at least one index."""
    ends = [0]
    upto = np.concatenate([[0], np.cumsum(lengths)])
    while ends[-1] < len(lengths):
        start = ends[-1]
        if layout == "padded":
            # A padded line is as long as the group's first row; a packed one adds just its own.
            end = start + tokens_max // int(lengths[start])
        else:
            end = int(np.searchsorted(upto, upto[start] + tokens_max, side="right")) - 1
        ends.append(min(max(end, start + 1), len(lengths)))
    return ends


def row_lengths(rows: TokenRows, indices: Sequence[int], width: int = 1) -> dict[int, int]:
    """Tokens of each index; rows that lie side by side are counted as long as the longest of them."""
    ends = rows.offsets
    return {
        index: width * max(int(ends[row + 1] - ends[row]) for row in range(index, index + width)) for index in indices
    }


def without_labels(batch: MicroBatch) -> MicroBatch:
    """The same rows with nothing to learn. A process without rows computes them where all processes must compute."""
    return replace(
        batch,
        labelled=0,
        label_ids=batch.label_ids[:0],
        label_places=batch.label_places[:0],
        label_rows=batch.label_rows[:0],
        label_counts=torch.zeros_like(batch.label_counts),
    )


def _padded(rows: TokenRows, group: list[int], device: str) -> MicroBatch:
    lines = [rows.row(index) for index in group]
    width = max(len(ids) for ids, _ in lines)
    input_ids = np.full((len(lines), width), PAD_ID, np.int64)
    for number, (ids, _) in enumerate(lines):
        input_ids[number, : len(ids)] = ids
    batch = _batch(rows, group, lines, input_ids, [number * width for number in range(len(lines))], device)
    lengths = tuple(len(ids) for ids, _ in lines)
    return replace(batch, line_tokens=lengths) if min(lengths) < width else batch


def _packed(rows: TokenRows, group: list[int], device: str) -> MicroBatch:
    lines = [rows.row(index) for index in group]
    lengths = [len(ids) for ids, _ in lines]
    ends = np.cumsum([0, *lengths], dtype=np.int32)
    input_ids = np.concatenate([ids for ids, _ in lines])[None].astype(np.int64)
    batch = _batch(rows, group, lines, input_ids, ends[:-1].tolist(), device)
    return replace(
        batch,
        position_ids=_on(device, np.concatenate([np.arange(length) for length in lengths])[None]),
        row_ends=_on(device, ends),
        row_numbers=_on(device, np.repeat(np.arange(len(lines)), lengths)[None]) if len(lines) > 1 else None,
        longest_row_tokens=max(lengths),
    )


def _batch(
    rows: TokenRows,
    group: list[int],
    lines: Sequence[tuple[NDArray[np.int32], NDArray[np.bool_]]],
    input_ids: NDArray[np.int64],
    starts: Sequence[int],
    device: str,
) -> MicroBatch:
    """`starts` are the places of the rows' first tokens. A label is the next token of the same row: no label ever
    crosses into another row."""
    places = [np.flatnonzero(labelled[1:]) for _, labelled in lines]
    counts = np.array([len(row_places) for row_places in places], np.int64)
    return MicroBatch(
        input_ids=_on(device, input_ids),
        position_ids=None,
        rows=tuple(group),
        labelled=int(counts.sum()),
        label_ids=_on(device, _joined([ids[row + 1] for (ids, _), row in zip(lines, places, strict=True)])),
        label_places=_on(device, _joined([start + row for start, row in zip(starts, places, strict=True)])),
        label_rows=_on(device, np.repeat(np.arange(len(lines)), counts)),
        label_counts=_on(device, counts),
        row_weights=None if rows.weights is None else _on(device, rows.weights[group]),
    )


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    joined: NDArray[np.int64] = np.concatenate(parts).astype(np.int64)
    return joined


def _on(device: str, array: NDArray[Any]) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    # From pinned memory a copy runs beside the kernels, and nobody waits for it.
    return tensor.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else tensor
