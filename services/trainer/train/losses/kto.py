"""The loss that learns from single answers with thumbs up or thumbs down (KTO), and the objective of a run with it.

With r, the sum of log policy - log reference over the tokens of an answer, and z0, how far the policy has moved from
the reference on average over mismatched rows, at least 0 and without a gradient:

    loss = desirable_weight * (1 - sigmoid(beta * (r - z0)))       for thumbs up
    loss = undesirable_weight * (1 - sigmoid(beta * (z0 - r)))     for thumbs down

`beta * r` is the reward that the policy gives an answer. KTO: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8.
"""

from collections.abc import Sequence
from typing import Any

import torch

from services.trainer.train.data.batches.micro_batch import MicroBatch
from services.trainer.train.losses.objective import Evaluation, Reference, answer_log_probs
from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.settings.methods import Kto


def kto_losses(ratios: Any, divergence: Any, is_good: Any, kto: Kto) -> Any:
    """`ratios` [answers] carry the gradient, `divergence` is z0, `is_good` [answers] says thumbs up."""
    signs = is_good.to(ratios.dtype) * 2 - 1
    weights = torch.where(is_good, kto.desirable_weight, kto.undesirable_weight).to(ratios.dtype)
    # 1 - sigmoid(x) is sigmoid(-x), which keeps its digits where it is small.
    return weights * torch.sigmoid(-kto.beta * signs * (ratios - divergence))


class Judged:
    """Each row of a micro-batch is an answer; a negative weight is thumbs down. Give `take` a mean first."""

    def __init__(self, kto: Kto, reference: Reference, mismatched_reference: Reference) -> None:
        self._kto = kto
        self._reference = reference
        self._mismatched_reference = mismatched_reference
        self._divergence: Any = 0.0

    def look(self, model: CausalModel, batch: MicroBatch) -> Any:
        ratios = _ratios(self._mismatched_reference, model, batch)
        return ratios.sum() if batch.labelled else ratios.sum() * 0.0

    def take(self, mean: Any) -> None:
        self._divergence = mean.clamp(min=0.0)

    def bound_sum(self, batch: MicroBatch, guess_nats: float) -> Any:
        # No loss is larger, whatever the weights of the model are: only what is no number is refused.
        _, weights = _judgements(batch)
        largest = max(self._kto.desirable_weight, self._kto.undesirable_weight)
        return largest * weights.double().sum() * (1.0 if batch.labelled else 0.0)

    def units(self, batch: MicroBatch) -> float:
        return len(batch.rows) if batch.labelled else 0

    def loss_sum(self, model: CausalModel, batch: MicroBatch, scale: float = 1.0) -> Any:
        ratios = _ratios(self._reference, model, batch)
        if not batch.labelled:
            # Nothing to learn, but where weights are shared out every process has to take part in each pass.
            return ratios.sum() * 0.0
        is_good, weights = _judgements(batch)
        return (weights * kto_losses(ratios, self._divergence, is_good, self._kto)).sum() * scale

    def sums(self, model: CausalModel, batch: MicroBatch) -> list[float]:
        ratios = _ratios(self._reference, model, batch)
        if not batch.labelled:
            return [0.0] * 6
        is_good, weights = _judgements(batch)
        losses = weights * kto_losses(ratios, self._divergence, is_good, self._kto)
        rewards = self._kto.beta * ratios
        right = torch.where(is_good, ratios > self._divergence, ratios < self._divergence)
        found = [losses.sum(), right.sum(), rewards[is_good].sum(), rewards[~is_good].sum(), is_good.sum()]
        return [*(number.item() for number in found), self.units(batch)]

    def evaluation(self, totals: Sequence[float]) -> Evaluation:
        """An answer is right when the loss rates it on its side: good ones above z0, bad ones below."""
        loss, right, good_rewards, bad_rewards, good, answers = totals
        bad = answers - good
        # Where the cut left answers of one kind only, there is nothing to compare.
        margin = good_rewards / good - bad_rewards / bad if good and bad else 0.0
        return Evaluation(loss=loss / answers, reward_accuracy=right / answers, reward_margin=margin)


def _ratios(reference: Reference, model: CausalModel, batch: MicroBatch) -> Any:
    before = reference.log_probs(model, batch)
    return answer_log_probs(model, batch) - before


def _judgements(batch: MicroBatch) -> tuple[Any, Any]:
    """Which rows are good, and the weight of each."""
    weights = batch.row_weights
    if weights is None:
        # All of them weigh 1: thumbs up.
        weights = torch.ones(len(batch.rows), device=batch.input_ids.device)
    return weights > 0, weights.abs()
