"""Adds LoRA deltas to the rows of a batch that belong to an adapter, and to no other row, in plain torch.

A slot of -1 means "no adapter". It refuses to know engines and where slots come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """The rows of a batch that use the adapter in `slot`; a slice where they are neighbours, which copies nothing."""

    slot: int
    rows: slice | torch.Tensor


def group_rows(slots: torch.Tensor) -> tuple[RowGroup, ...]:
    """Group the rows of a batch by slot; `slots` holds one slot per row, rows without an adapter fall out."""
    groups = []
    for slot in torch.unique(slots).tolist():
        if slot < 0:
            continue
        rows = torch.nonzero(slots == slot).flatten()
        first, last = int(rows[0]), int(rows[-1])
        neighbours = last - first + 1 == rows.numel()
        groups.append(RowGroup(slot=slot, rows=slice(first, last + 1) if neighbours else rows))
    return tuple(groups)


def shrink(
    out: torch.Tensor, inputs: torch.Tensor, lora_a: torch.Tensor, scale: float, groups: Sequence[RowGroup]
) -> None:
    """out[rows, :rank] = scale * inputs[rows] @ A[slot].T with lora_a of shape (slots, 1, rank, in features)."""
    for group in groups:
        matrix = lora_a[group.slot, 0].to(out.dtype)
        out[group.rows, : matrix.shape[0]] = scale * (inputs[group.rows].to(out.dtype) @ matrix.T)


def expand(
    out: torch.Tensor, inputs: torch.Tensor, lora_b: torch.Tensor, columns: slice, groups: Sequence[RowGroup]
) -> None:
    """out[rows, columns] += inputs[rows] @ B[slot].T with lora_b of shape (slots, 1, out features, rank)."""
    part = out[:, columns]
    for group in groups:
        matrix = lora_b[group.slot, 0].to(out.dtype)
        part[group.rows] += inputs[group.rows].to(out.dtype) @ matrix.T
