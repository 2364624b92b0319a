"""Hidden states, a head and labels to try the losses over the vocabulary on."""

from typing import NamedTuple

import torch


class HeadCase(NamedTuple):
    """`logits` are what the plain way makes of the hidden states, capped where a softcap was asked for."""

    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    logits: torch.Tensor


def head_case(softcap: float | None) -> HeadCase:
    """33 tokens of a vocabulary of 50, the same each time; gradients reach hidden states and head."""
    torch.manual_seed(0)
    hidden = torch.randn(33, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    labels = torch.randint(0, 50, (33,))
    logits = hidden @ weight.T
    return HeadCase(hidden, weight, labels, logits if softcap is None else softcap * torch.tanh(logits / softcap))
