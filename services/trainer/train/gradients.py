"""The gradients of one step: forward and backward over its micro-batches, on every process, in as much memory as there is.

When memory runs out the step starts again with micro-batches of half the tokens: twice as many of them, the same rows, the same
sums. It knows no optimizer, and a step that is done is never done again.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from services.trainer.train.batches import MicroBatch
from services.trainer.train.distributed import seed_of_step
from services.trainer.train.inputs import idle_batch
from services.trainer.train.memory import fits, halve, release
from services.trainer.train.random_states import restore_torch_states, torch_states

if TYPE_CHECKING:
    from services.trainer.train.run import Run


def gradients_of_step(run: "Run", step: int) -> tuple[Any, int]:
    """The mean loss over the labelled tokens, or the pairs of answers, of the whole step, where it lies, and how many tokens the
    step has. The gradients are those of that mean and the same on every process. Raises Failure(platform, JOB_TOO_LARGE) when
    not even single rows fit."""
    while True:
        random_states = torch_states()
        batches, tokens = run.batches.take(step, run.micro_batch_tokens) or (None, 0)
        loss = _try(run, step, batches)
        if loss is not None:
            run.group.add_gradients(run.model.trainable.values())
            return run.group.add(loss), tokens
        run.optimizer.zero_grad(set_to_none=True)
        release()
        restore_torch_states(random_states)
        _halve(run, step, batches)


def _try(run: "Run", step: int, batches: list[MicroBatch] | None) -> Any | None:
    """This process's part of the loss; None when memory ran out on one of the processes: the division of rows is everybody's. It
    may have run out before, so that a process has no `batches`."""
    group = run.group
    objective = run.objective
    units, without = group.total([sum(objective.units(batch) for batch in batches or ()), float(batches is None)])
    if batches is None or without:
        return None
    if group.size > 1:
        torch.manual_seed(seed_of_step(run.inputs.spec.seed, step, group.rank))
    # FSDP takes the mean over the processes where we want the sum.
    scale = (group.size if group.sharded else 1) / units
    # It stays where it is made: to look at it after every micro-batch would let a GPU run dry.
    loss = torch.zeros((), dtype=torch.float64, device=run.model.device)

    def learn(batch: MicroBatch) -> None:
        nonlocal loss
        batch_loss = objective.loss_sum(run.model, batch, scale)
        batch_loss.backward()
        loss += batch_loss.detach().double() / (scale * units)

    return loss if fits(run.model, group, batches, learn, lambda: idle_batch(run.inputs, batches)) else None


def _halve(run: "Run", step: int, batches: list[MicroBatch] | None) -> None:
    spent = run.micro_batch_tokens
    fewest = run.inputs.train.rows.rows_per_example
    # What could not even be laid out may hold more than single rows.
    divisible = run.group.any(batches is None or any(len(batch.rows) > fewest for batch in batches))
    where = f"at step {step + 1}"
    if batches:
        where += f" (longest row here {max(batch.input_ids.shape[-1] for batch in batches)} tokens)"
    run.micro_batch_tokens = halve(spent, where, divisible=divisible)
    run.position = replace(run.position, micro_batch_tokens=run.micro_batch_tokens)
    run.emit(
        "warning",
        code="OUT_OF_MEMORY_RETRIED",
        message=f"out of memory at step {step + 1}: micro-batches have at most {run.micro_batch_tokens} tokens from here on "
        f"instead of {spent}, and there are about twice as many of them; the step is done again with the same rows",
    )
