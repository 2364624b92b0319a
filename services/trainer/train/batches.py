"""Lays the rows of a step out as tensors, in one of two ways that compute the same sums.

`padded` (CPU): rows of like length side by side, padded at the right. Under causal attention no real token can see a pad
behind it, so no mask is needed and nothing leaks; a token budget bounds the padding and the memory.
`packed` (CUDA): rows end to end in one line whose positions start anew with every row, which is what variable-length attention
kernels take. Rows of a step are one batch in arithmetic: the loss is a sum over its labelled tokens, however they are laid out.
It knows no model.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from services.trainer.train.tokens import TokenRows

Layout = Literal["padded", "packed"]
IGNORED = -100
PAD_ID = 0


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """`input_ids` and `targets` are [lines, length]; a target is the id of the next token or IGNORED. `position_ids` is None
    for padded lines. `rows` are row indices in the order in which they lie here. `weights` [lines, length] multiply the loss of
    each target; None when all rows weigh 1. `row_ends` int32 [rows + 1] are where packed rows meet, from 0 on; None for padded lines."""

    input_ids: torch.Tensor
    targets: torch.Tensor
    position_ids: torch.Tensor | None
    rows: tuple[int, ...]
    labelled: int
    weights: torch.Tensor | None = None
    row_ends: torch.Tensor | None = None
    longest_row_tokens: int = 0


def layout_for(device: str) -> Layout:
    return "packed" if device.startswith("cuda") else "padded"


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
    """Where micro-batches meet, from 0 on, in a line of lengths that do not grow: each holds at most `tokens_max` tokens with its
    padding, but at least one index."""
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
    """The same rows with nothing to learn: what a process computes while others still have work, where all must compute."""
    return replace(batch, targets=torch.full_like(batch.targets, IGNORED), labelled=0)


def _padded(rows: TokenRows, group: list[int], device: str) -> MicroBatch:
    lines = [_line(rows, index) for index in group]
    width = max(len(ids) for ids, _ in lines)
    input_ids = np.full((len(lines), width), PAD_ID, np.int64)
    targets = np.full((len(lines), width), IGNORED, np.int64)
    for number, (ids, row_targets) in enumerate(lines):
        input_ids[number, : len(ids)] = ids
        targets[number, : len(ids)] = row_targets
    weights = None
    if rows.weights is not None:
        weights = np.repeat(rows.weights[group][:, None], width, axis=1)
    return _batch(input_ids, targets, None, weights, group, device)


def _packed(rows: TokenRows, group: list[int], device: str) -> MicroBatch:
    lines = [_line(rows, index) for index in group]
    input_ids = np.concatenate([ids for ids, _ in lines])[None].astype(np.int64)
    targets = np.concatenate([row_targets for _, row_targets in lines])[None]
    positions = np.concatenate([np.arange(len(ids)) for ids, _ in lines])[None]
    weights = None
    if rows.weights is not None:
        weights = np.repeat(rows.weights[group], [len(ids) for ids, _ in lines])[None]
    lengths = [len(ids) for ids, _ in lines]
    ends = np.cumsum([0, *lengths], dtype=np.int32)
    batch = _batch(input_ids, targets, positions, weights, group, device)
    return replace(batch, row_ends=_on(device, ends), longest_row_tokens=max(lengths))


def _line(rows: TokenRows, index: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Ids and, for each, the next token of the same row if that one is labelled: no target ever crosses into another row."""
    ids, labelled = rows.row(index)
    targets = np.full(len(ids), IGNORED, np.int64)
    targets[:-1] = np.where(labelled[1:], ids[1:], IGNORED)
    return ids, targets


def _batch(
    input_ids: NDArray[np.int64],
    targets: NDArray[np.int64],
    positions: NDArray[np.int64] | None,
    weights: NDArray[np.float32] | None,
    group: list[int],
    device: str,
) -> MicroBatch:
    return MicroBatch(
        input_ids=_on(device, input_ids),
        targets=_on(device, targets),
        position_ids=None if positions is None else _on(device, positions),
        rows=tuple(group),
        labelled=int((targets != IGNORED).sum()),
        weights=None if weights is None else _on(device, weights),
    )


def _on(device: str, array: NDArray[Any]) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    # From pinned memory a copy runs beside the kernels, and nobody waits for it.
    return tensor.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else tensor
