"""How a step balances the experts of a mixture: its loss is that of all rows of the step together.

Which experts the tokens of a step choose is counted before the first gradient, over all micro-batches and processes. So
the loss does not depend on how rows are dealt and laid out, as little as every other loss. A step that is one
micro-batch counts on the way. It knows no optimizer.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from services.trainer.train.data.batches.micro_batch import MicroBatch
from services.trainer.train.loop.look import look_over
from services.trainer.train.losses.balancing import Use, balancing_part, use_of
from services.trainer.train.losses.objective import Objective
from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.runtime.process_group import Group


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Of all tokens of a step: float32 [experts], and by how many decisions."""

    counts: Any
    decisions: float


def count_choices(
    model: CausalModel, batches: Iterable[MicroBatch], idle: Callable[[], MicroBatch], group: Group
) -> Choices | None:
    """A pass over all micro-batches of a step. None, on every process, when memory ran out."""
    routers = model.routers
    assert routers is not None
    counts = torch.zeros(routers.experts, device=model.device)
    decisions = 0.0

    def look(batch: MicroBatch) -> None:
        nonlocal decisions
        heard: list[Use] = []
        with routers.listen(lambda logits: heard.append(_use(model, batch, logits)), with_gradient=False):
            model.call(_pass, model, batch)
        if batch.labelled:
            counts.add_(heard[0].choices)
            decisions += heard[0].decisions

    if not look_over(model, group, batches, look, idle):
        return None
    (decisions_of_all,) = group.total([decisions])
    return Choices(counts=group.add(counts), decisions=decisions_of_all)


def balanced_loss(
    model: CausalModel, objective: Objective, batch: MicroBatch, scale: float, weight: float, choices: Choices | None
) -> tuple[Any, Any, Any]:
    """A scalar to take the gradient of; then, without a gradient, the part of the objective's loss in it, and that of
    the balancing loss, None where nothing is balanced. `weight` multiplies the balancing loss besides its coefficient.
    Without `choices` this micro-batch is the whole step."""
    if model.routers is None:
        loss = objective.loss_sum(model, batch, scale)
        return loss, loss.detach(), None
    heard: list[Use] = []
    with model.routers.listen(lambda logits: heard.append(_use(model, batch, logits)), with_gradient=True):
        loss = objective.loss_sum(model, batch, scale)
    if not batch.labelled:
        return loss, loss.detach(), None
    (use,) = heard
    step = choices or Choices(counts=use.choices, decisions=use.decisions)
    part = balancing_part(use, step.counts, step.decisions)
    return loss + model.routers.coefficient * weight * part, loss.detach(), part.detach()


def _use(model: CausalModel, batch: MicroBatch, logits: Any) -> Use:
    assert model.routers is not None
    return use_of(logits, model.routers.chosen, batch.real_tokens(), batch.tokens)


def _pass(model: CausalModel, batch: MicroBatch) -> None:
    model.labelled_hidden(batch)
