"""Micro-batches in which every line is one whole row and every token but the first is learned from."""

import torch

from services.trainer.train.data.batches.micro_batch import MicroBatch


def full_lines(ids: torch.Tensor, row_weights: torch.Tensor | None = None) -> MicroBatch:
    """`ids` are [lines, length]."""
    lines, length = ids.shape
    places = torch.arange(lines * length).view(lines, length)[:, :-1]
    return MicroBatch(
        input_ids=ids,
        position_ids=None,
        rows=tuple(range(lines)),
        labelled=places.numel(),
        label_ids=ids[:, 1:].flatten(),
        label_places=places.flatten(),
        label_rows=(places // length).flatten(),
        label_counts=torch.full((lines,), length - 1),
        row_weights=row_weights,
    )
