"""Lays the rows of a step out as tensors, in one of two ways that compute the same sums.

`padded` (CPU): rows of like length side by side, padded at the right. Under causal attention no real token can see a pad
behind it, so no mask is needed and nothing leaks; a token budget bounds the padding and the memory.
`packed` (CUDA): rows end to end in one line whose positions start anew with every row, which is what variable-length attention
kernels take. Rows of a step are one batch in arithmetic: the loss is a sum over its labelled tokens, however they are laid out.
It knows no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
    for padded lines. `rows` are row indices in the order in which they lie here."""

    input_ids: torch.Tensor
    targets: torch.Tensor
    position_ids: torch.Tensor | None
    rows: tuple[int, ...]
    labelled: int


def layout_for(device: str) -> Layout:
    return "packed" if device.startswith("cuda") else "padded"


def micro_batches(
    rows: TokenRows, indices: Sequence[int], *, tokens_max: int, layout: Layout, device: str
) -> list[MicroBatch]:
    """Longest rows first; a micro-batch holds at most `tokens_max` tokens with its padding, but at least one row."""
    ordered = sorted(indices, key=lambda index: (-int(rows.offsets[index + 1] - rows.offsets[index]), index))
    lengths = {index: int(rows.offsets[index + 1] - rows.offsets[index]) for index in ordered}
    groups: list[list[int]] = []
    used = 0
    for index in ordered:
        # A padded line is as long as the group's first row; a packed one adds just its own.
        cost = lengths[groups[-1][0]] if groups and layout == "padded" else lengths[index]
        if not groups or used + cost > tokens_max:
            groups.append([])
            used, cost = 0, lengths[index]
        groups[-1].append(index)
        used += cost
    lay = _padded if layout == "padded" else _packed
    return [lay(rows, group, device) for group in groups]


def _padded(rows: TokenRows, group: list[int], device: str) -> MicroBatch:
    lines = [_line(rows, index) for index in group]
    width = max(len(ids) for ids, _ in lines)
    input_ids = np.full((len(lines), width), PAD_ID, np.int64)
    targets = np.full((len(lines), width), IGNORED, np.int64)
    for number, (ids, row_targets) in enumerate(lines):
        input_ids[number, : len(ids)] = ids
        targets[number, : len(ids)] = row_targets
    return _batch(input_ids, targets, None, group, device)


def _packed(rows: TokenRows, group: list[int], device: str) -> MicroBatch:
    lines = [_line(rows, index) for index in group]
    input_ids = np.concatenate([ids for ids, _ in lines])[None].astype(np.int64)
    targets = np.concatenate([row_targets for _, row_targets in lines])[None]
    positions = np.concatenate([np.arange(len(ids)) for ids, _ in lines])[None]
    return _batch(input_ids, targets, positions, group, device)


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
    group: list[int],
    device: str,
) -> MicroBatch:
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids).to(device),
        targets=torch.from_numpy(targets).to(device),
        position_ids=None if positions is None else torch.from_numpy(positions).to(device),
        rows=tuple(group),
        labelled=int((targets != IGNORED).sum()),
    )
