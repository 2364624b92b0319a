"""The loss that keeps all experts of a mixture in use.

Over the tokens of a step and all routers of a model, with f_e how often expert e was among the chosen ones and p_e the
mean probability that the routers gave it:

    loss = experts * sum over e of f_e * p_e

It is smallest when every expert gets the same share. Only p has a gradient. Fedus et al. 2021 (Switch Transformers),
arXiv:2101.03961, eq. 4-6; the same value as load_balancing_loss_func of transformers gives for one batch with all rows
of the step. It knows no model and no step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Use:
    """Of some tokens: float32 [experts] sums of choices, without a gradient, and of probabilities; `decisions` is
    tokens times routers."""

    choices: Any
    probabilities: Any
    decisions: float


def use_of(logits: Sequence[Any], chosen: int, real: Any | None, tokens: int) -> Use:
    """`logits` of each router, [tokens and pads, experts]; `real` [tokens and pads] is 1 for tokens and 0 for pads,
    None without pads. `tokens` is how many are real."""
    choices: Any = 0.0
    probabilities: Any = 0.0
    for each in logits:
        shares = torch.softmax(each.float().reshape(-1, each.shape[-1]), dim=-1)
        with torch.no_grad():
            taken = torch.zeros_like(shares).scatter_(1, shares.topk(chosen, dim=-1).indices, 1.0)
        if real is not None:
            shares, taken = shares * real[:, None], taken * real[:, None]
        choices = choices + taken.sum(dim=0)
        probabilities = probabilities + shares.sum(dim=0)
    return Use(choices=choices, probabilities=probabilities, decisions=float(tokens * len(logits)))


def balancing_part(use: Use, choices: Any, decisions: float) -> Any:
    """A scalar with a gradient: the part of these tokens in the loss of a step, whose sum over all of its parts is the
    loss. `choices` and `decisions` are those of the whole step."""
    return (choices * use.probabilities).sum() * (len(use.probabilities) / decisions**2)
