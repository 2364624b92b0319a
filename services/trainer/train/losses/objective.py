"""What a run learns from: labelled tokens, or answers that people preferred or judged.

An objective turns a micro-batch into a loss to sum, and says what that sum is a mean over. It knows no optimizer, no
step and no schedule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from services.trainer.train.data.batches.micro_batch import MicroBatch
from services.trainer.train.losses.cross_entropy import cross_entropy_sum
from services.trainer.train.losses.log_probs import row_sums, token_log_probs
from services.trainer.train.losses.preference_loss import (
    EXPLODED_GUESSES,
    Answers,
    PreferenceLoss,
    loss_bounds,
    preference_loss,
)
from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.settings.methods import Dpo

# Sums over rows and bounds on them round differently.
_ROUNDING = 1e-3


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Means over the validation file: `loss` per labelled token, per pair or per answer (nats); the share of the pairs
    whose preferred answer has the larger reward, or of the answers whose reward is on the right side; and by how much
    the reward of good answers is larger than that of bad ones. The last two are None without judged answers."""

    loss: float
    reward_accuracy: float | None = None
    reward_margin: float | None = None


def is_sound(loss: Any, bound: Any) -> Any:
    """Whether a mean loss is at most the mean `bound` of the same units; of tensors a flag on their device. Not true of
    NaN."""
    return loss <= bound * (1.0 + _ROUNDING)


class Objective(Protocol):
    def bound_sum(self, batch: MicroBatch, guess_nats: float) -> Any:
        """A scalar, on the batch's device: beyond this sum over the batch's units the model is being destroyed, long
        before a number overflows. It is measured in guesses: who knows nothing loses `guess_nats` on a token, the
        logarithm of the vocabulary. It follows the weights of rows, the lengths of answers and all settings of the
        loss, so that none of them makes a sound model look like one that is being destroyed."""
        ...

    def units(self, batch: MicroBatch) -> float:
        """What the loss of a step is a mean over; 0 for a batch without labels."""
        ...

    def loss_sum(self, model: CausalModel, batch: MicroBatch, scale: float = 1.0) -> Any:
        """A scalar to take the gradient of as it is: `scale` times the sum over the batch's units."""
        ...

    def sums(self, model: CausalModel, batch: MicroBatch) -> list[float]:
        """For an evaluation: what is added up over batches and processes. The first number is the loss, the last the
        units."""
        ...

    def evaluation(self, totals: Sequence[float]) -> Evaluation: ...


@runtime_checkable
class LooksAhead(Protocol):
    """An objective that wants to know a mean over mismatched rows before a step or an evaluation."""

    def look(self, model: CausalModel, batch: MicroBatch) -> Any:
        """A scalar, without a gradient: the sum over the batch's rows."""
        ...

    def take(self, mean: Any) -> None:
        """The mean over all rows and processes, for the step or the evaluation that follows."""
        ...


class Supervised:
    """The cross-entropy of labelled tokens."""

    def bound_sum(self, batch: MicroBatch, guess_nats: float) -> Any:
        counts = batch.label_counts.double()
        return (
            EXPLODED_GUESSES * guess_nats * (counts if batch.row_weights is None else counts * batch.row_weights).sum()
        )

    def units(self, batch: MicroBatch) -> float:
        return batch.labelled

    def loss_sum(self, model: CausalModel, batch: MicroBatch, scale: float = 1.0) -> Any:
        return token_loss_sum(model, batch, scale)

    def sums(self, model: CausalModel, batch: MicroBatch) -> list[float]:
        return [token_loss_sum(model, batch).item(), self.units(batch)]

    def evaluation(self, totals: Sequence[float]) -> Evaluation:
        loss, units = totals
        return Evaluation(loss=loss / units)


class Reference(Protocol):
    """The policy that answers are compared with."""

    def log_probs(self, model: CausalModel, batch: MicroBatch) -> Any:
        """Sums over the labelled tokens of each row, float32 [rows], without a gradient."""
        ...


class AdapterOff:
    """The base under the adapter that is trained: the same weights in memory, with the adapter switched off."""

    def log_probs(self, model: CausalModel, batch: MicroBatch) -> Any:
        was_training = model.module.training
        # No dropout: a reference is one model, not a new one each time.
        model.module.eval()
        try:
            with torch.no_grad(), model.module.disable_adapter():
                return answer_log_probs(model, batch)
        finally:
            # Also when memory runs out here: what follows is done again, with dropout.
            model.module.train(was_training)


class Preferences:
    """Rows 2i and 2i + 1 of a micro-batch are the preferred and the other answer to one question. `reference` is None
    when the method needs none."""

    def __init__(self, dpo: Dpo, reference: Reference | None) -> None:
        self._dpo = dpo
        self._reference = reference

    def bound_sum(self, batch: MicroBatch, guess_nats: float) -> Any:
        lengths = batch.label_counts.double()
        bounds = loss_bounds(
            lengths[::2], lengths[1::2], guess_nats, self._dpo, has_reference=self._reference is not None
        )
        return self._weighted(bounds, batch) if batch.labelled else bounds.sum() * 0.0

    def units(self, batch: MicroBatch) -> float:
        return len(batch.rows) // 2 if batch.labelled else 0

    def loss_sum(self, model: CausalModel, batch: MicroBatch, scale: float = 1.0) -> Any:
        if not batch.labelled:
            # Nothing to learn, but where weights are shared out every process has to take part in each pass.
            if self._reference is not None:
                self._reference.log_probs(model, batch)
            return answer_log_probs(model, batch).sum() * 0.0
        return self._weighted(self._compare(model, batch).losses, batch) * scale

    def sums(self, model: CausalModel, batch: MicroBatch) -> list[float]:
        if not batch.labelled:
            self.loss_sum(model, batch)
            return [0.0, 0.0, 0.0, 0.0]
        compared = self._compare(model, batch)
        margins = compared.preferred_rewards - compared.other_rewards
        loss = self._weighted(compared.losses, batch).item()
        return [loss, (margins > 0).float().sum().item(), margins.sum().item(), self.units(batch)]

    def evaluation(self, totals: Sequence[float]) -> Evaluation:
        loss, won, margin, pairs = totals
        return Evaluation(loss=loss / pairs, reward_accuracy=won / pairs, reward_margin=margin / pairs)

    def _compare(self, model: CausalModel, batch: MicroBatch) -> PreferenceLoss:
        reference = None if self._reference is None else self._reference.log_probs(model, batch)
        policy = answer_log_probs(model, batch)
        lengths = batch.label_counts
        preferred, other = (
            Answers(
                policy=policy[side::2],
                reference=None if reference is None else reference[side::2],
                lengths=lengths[side::2],
            )
            for side in (0, 1)
        )
        return preference_loss(preferred, other, self._dpo)

    def _weighted(self, losses: Any, batch: MicroBatch) -> Any:
        weights = batch.row_weights
        return losses.sum() if weights is None else (losses * weights[::2]).sum()


def answer_log_probs(model: CausalModel, batch: MicroBatch) -> Any:
    """Sums of log-probabilities over the labelled tokens of each row, float32 [rows]; the head sees those tokens
    only."""
    return model.call(_answer_log_probs, model, batch)


def _answer_log_probs(model: CausalModel, batch: MicroBatch) -> Any:
    hidden, targets = model.labelled_hidden(batch)
    scores = token_log_probs(hidden, model.head_weight, targets, model.softcap, in_place=model.in_place)
    return row_sums(scores, batch.label_rows, len(batch.rows))


def token_loss_sum(model: CausalModel, batch: MicroBatch, scale: float = 1.0) -> Any:
    """`scale` times the sum of the cross-entropy over the labelled tokens, a float32 scalar in nats."""
    return model.call(_token_loss_sum, model, batch, scale)


def _token_loss_sum(model: CausalModel, batch: MicroBatch, scale: float) -> Any:
    hidden, targets = model.labelled_hidden(batch)
    return cross_entropy_sum(
        hidden,
        model.head_weight,
        targets,
        model.softcap,
        batch.label_weights,
        scale=scale,
        in_place=model.in_place,
    )
