"""Losses that learn from a pair of answers, one preferred to the other.

Pure: tensors of log-probabilities in, losses out.

For a pair, with sums of log-probabilities over the tokens of an answer, of the policy that is trained and of the
reference:

    ratio(answer) = log policy(answer) - log reference(answer)
    loss = -log sigmoid(beta * (ratio(preferred) - ratio(other)))                                              (DPO)

`beta * ratio` is the reward that the policy gives an answer. Variants: ratios divided by the answers' lengths; no
reference (its log-probabilities count as zero); `simpo_gamma`, a margin inside the sigmoid over lengths and without a
reference, which is SimPO; `rpo_alpha`, the negative log-likelihood of the preferred answer per token on top.

DPO: Rafailov et al. 2023, arXiv:2305.18290, eq. 7. RPO: Pang et al. 2024, arXiv:2404.19733, eq. 1-2. SimPO: Meng et al.
2024, arXiv:2405.14734, eq. 6.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from services.trainer.train.settings.methods import Dpo

# A policy that loses so many times what a guess does on each token, on average, is being destroyed.
EXPLODED_GUESSES = 10.0


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Log-probability sums [pairs] and label counts [pairs] of the preferred answers, or of the others. `reference` is
    None when nothing is compared with."""

    policy: Any
    reference: Any | None
    lengths: Any


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """`losses` [pairs] carries the gradient; the rewards [pairs] are for people."""

    losses: Any
    preferred_rewards: Any
    other_rewards: Any


def preference_loss(preferred: Answers, other: Answers, dpo: Dpo) -> PreferenceLoss:
    preferred_rewards = dpo.beta * _ratio(preferred, dpo)
    other_rewards = dpo.beta * _ratio(other, dpo)
    losses = -functional.logsigmoid(preferred_rewards - other_rewards - dpo.simpo_gamma)
    if dpo.rpo_alpha:
        losses = losses - dpo.rpo_alpha * preferred.policy / preferred.lengths
    return PreferenceLoss(
        losses=losses, preferred_rewards=preferred_rewards.detach(), other_rewards=other_rewards.detach()
    )


def loss_bounds(preferred_lengths: Any, other_lengths: Any, guess_nats: float, dpo: Dpo, *, has_reference: bool) -> Any:
    """[pairs]: a loss beyond which the policy is being destroyed; `guess_nats` is what a guess loses on a token.

    Without a reference a policy that loses EXPLODED_GUESSES on each token of the preferred answer has lost it. With one
    it started level, and is lost when it has fallen behind by a guess on each token of both answers; short answers may
    be rated by so many guesses more, because a sound policy can be sure of a wrong word."""
    preferred, other = (
        torch.ones_like(lengths) if dpo.by_length else lengths for lengths in (preferred_lengths, other_lengths)
    )
    guesses = preferred + other + EXPLODED_GUESSES if has_reference else EXPLODED_GUESSES * preferred
    behind = dpo.beta * guess_nats * guesses
    return functional.softplus(behind + dpo.simpo_gamma) + dpo.rpo_alpha * EXPLODED_GUESSES * guess_nats


def _ratio(answers: Answers, dpo: Dpo) -> Any:
    ratio = answers.policy if answers.reference is None else answers.policy - answers.reference
    return ratio / answers.lengths if dpo.by_length else ratio
