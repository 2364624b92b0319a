"""Deltas reach the rows of their adapter and no other row, in whatever order a batch mixes them."""

from __future__ import annotations

import pytest
import torch

from services.inference.engines.adapters.lora_rows import expand, group_rows, shrink

SLOTS, RANK, WIDE_IN, WIDE_OUT = 3, 4, 8, 6


@pytest.mark.parametrize(
    "slots", [[-1, -1], [0, 0, 0], [2, -1, 2, 0], [-1, 1, 1, -1, 0, 2, 2], [1], [-1]], ids=lambda slots: str(slots)
)
def test_each_row_gets_the_delta_of_its_own_adapter(slots: list[int]) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(len(slots), WIDE_IN)
    lora_a = torch.randn(SLOTS, 1, RANK, WIDE_IN)
    lora_b = torch.randn(SLOTS, 1, WIDE_OUT, RANK)
    before = torch.randn(len(slots), WIDE_OUT + 4)
    out, middle = before.clone(), torch.zeros(len(slots), RANK)
    groups = group_rows(torch.tensor(slots))
    shrink(middle, inputs, lora_a, 0.5, groups)
    expand(out, middle, lora_b, slice(2, 2 + WIDE_OUT), groups)
    expected = before.clone()
    for row, slot in enumerate(slots):
        if slot >= 0:
            expected[row, 2 : 2 + WIDE_OUT] += lora_b[slot, 0] @ (0.5 * lora_a[slot, 0] @ inputs[row])
    assert torch.allclose(out, expected, atol=1e-5)


def test_neighbours_are_a_slice() -> None:
    groups = group_rows(torch.tensor([0, 0, 1, -1, 1]))
    assert groups[0].rows == slice(0, 2)
    assert isinstance(groups[1].rows, torch.Tensor)
