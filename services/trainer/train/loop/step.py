"""One step: its gradients, the optimizer's update, and the report when it is due.

The host launches a step without waiting for the device and reads its numbers when the next one is under way. So an
update that must not be applied is skipped on the device itself, and so are all that come after it.

When memory runs out the step starts again with micro-batches of half the tokens: twice as many of them, the same rows,
the same sums. It knows no evaluation, no checkpoint and no export.
"""

import math
import time
from dataclasses import replace
from typing import Any

import torch

from formats.learning_rates import learning_rate_at
from services.trainer.train.checkpoint.random_states import restore_torch_states, torch_states
from services.trainer.train.data.batches.micro_batch import MicroBatch
from services.trainer.train.data.batches.run_batches import idle_batch, mismatched_of_step
from services.trainer.train.loop.async_checkpoint import kept_checkpoint
from services.trainer.train.loop.balance import balanced_loss, count_choices
from services.trainer.train.loop.device_read import DeviceRead
from services.trainer.train.loop.divergence import look_ahead
from services.trainer.train.loop.progress_report import StepRecord
from services.trainer.train.loop.state import Launched, Run
from services.trainer.train.losses.objective import is_sound
from services.trainer.train.memory.out_of_memory import fits, halve, release, unless_full
from services.trainer.train.modeling.optimizer import clip_gradients, update
from services.trainer.train.runtime.process_group import seed_of_step
from services.trainer.train.settings.failures import Failure, user_failure


def train_step(run: Run, step: int) -> None:
    """Takes one optimizer step on the sequences that the schedule names, and then reads the numbers of the step before
    it. Raises Failure(user) when that one diverged. Its poisoned update was not applied, nor was any after it."""
    try:
        launched = launch_step(run, step)
    finally:
        settle_step(run)
    run.launched = launched


def launch_step(run: Run, step: int) -> Launched:
    """Everything of a step except reading its numbers."""
    spec, schedule = run.inputs.spec, run.inputs.schedule
    started_s = time.monotonic()
    rate = learning_rate_at(step, schedule.total_steps, spec.learning_rate, spec.warmup_ratio, spec.schedule)
    loss, bound, balancing, tokens = gradients_of_step(run, step)
    loss, bound, norm = (
        torch.as_tensor(number, dtype=torch.float64, device=run.model.device)
        for number in (loss, bound, clip_gradients(run.model.trainable.values(), spec.max_grad_norm))
    )
    # Neither is true of NaN.
    sound = (norm < math.inf) & is_sound(loss, bound)
    run.poisoned = ~sound if run.poisoned is None else run.poisoned | ~sound
    update(run.optimizer, rate, skipped=run.poisoned)
    run.optimizer.zero_grad(set_to_none=True)
    return Launched(
        step=step,
        learning_rate=rate,
        tokens=tokens,
        started_s=started_s,
        numbers=DeviceRead(torch.stack([loss, norm, bound, balancing])),
    )


def gradients_of_step(run: Run, step: int) -> tuple[Any, Any, Any, int]:
    """Makes the gradients of a step, those of its mean loss over the labelled tokens, or the examples, of the whole
    step, and of the balancing loss of a mixture of experts, the same on every process. Returns that mean, the bound of
    a sound one, and the balancing loss (0 without a mixture), all on the device, and how many tokens the step has.
    Raises Failure(platform, JOB_TOO_LARGE) when not even single rows fit."""
    while True:
        random_states = torch_states()
        batches, tokens = run.batches.take(step, run.micro_batch_tokens) or (None, 0)
        means = _try(run, step, batches)
        if means is not None:
            run.group.add_gradients(run.model.trainable.values())
            loss, bound, balancing = run.group.add(means)
            return loss, bound, balancing, tokens
        run.optimizer.zero_grad(set_to_none=True)
        release()
        restore_torch_states(random_states)
        _halve(run, step, batches)


def _try(run: Run, step: int, batches: list[MicroBatch] | None) -> Any | None:
    """This process's parts of the mean loss, of its bound and of the balancing loss, float64 [3]. None when memory ran
    out on any of the processes, because they divide the rows among them. It may have run out while rows were laid out;
    then this process has no `batches`."""
    group = run.group
    objective = run.objective
    units, without, learning = group.total(
        [
            sum(objective.units(batch) for batch in batches or ()),
            float(batches is None),
            float(sum(batch.labelled > 0 for batch in batches or ())),
        ]
    )
    if batches is None or without:
        return None
    if group.size > 1:
        torch.manual_seed(seed_of_step(run.inputs.spec.seed, step, group.rank))
    if not _look_ahead(run, step):
        return None

    def idle() -> MicroBatch:
        return idle_batch(run.inputs, run.inputs.train.rows, batches)

    choices = None
    if run.model.routers is not None and learning > 1:
        choices = count_choices(run.model, batches, idle, group)
        if choices is None:
            return None
    # FSDP takes the mean over the processes where we want the sum.
    weight = group.size if group.sharded else 1
    scale = weight / units
    # They stay on the device: to read them after every micro-batch would let a GPU run dry.
    means = torch.zeros(3, dtype=torch.float64, device=run.model.device)
    guess_nats = math.log(run.model.head_weight.shape[0])

    def learn(batch: MicroBatch) -> None:
        loss, own, balancing = balanced_loss(run.model, objective, batch, scale, weight, choices)
        loss.backward()
        means[0] += own.double() / (scale * units)
        if balancing is not None:
            means[2] += balancing
        means[1] += objective.bound_sum(batch, guess_nats) / units

    return means if fits(run.model, group, batches, learn, idle) else None


def _look_ahead(run: Run, step: int) -> bool:
    """False when memory ran out on one of the processes."""
    inputs, rows = run.inputs, run.inputs.train_mismatched
    if rows is None:
        return True
    batches = unless_full(lambda: mismatched_of_step(inputs, step, run.group, run.micro_batch_tokens))
    if run.group.any(batches is None) or batches is None:
        return False
    return look_ahead(run.model, run.objective, batches, lambda: idle_batch(inputs, rows, batches), run.group)


def _halve(run: Run, step: int, batches: list[MicroBatch] | None) -> None:
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
        message=f"out of memory at step {step + 1}: micro-batches have at most {run.micro_batch_tokens} tokens from "
        f"here on instead of {spent}, and there are about twice as many of them; the step is done again with the same "
        "rows",
    )


def settle_step(run: Run) -> None:
    """Reads the numbers of the step that was launched last. Whatever follows a step calls this first. Raises
    Failure(user)."""
    launched = run.launched
    if launched is None:
        return
    run.launched = None
    loss, norm, bound, balancing = launched.numbers.read()
    if not (math.isfinite(norm) and is_sound(loss, bound)):
        raise _diverged(run, launched, loss, norm, bound)
    schedule = run.inputs.schedule
    finished = launched.step + 1
    epoch, epoch_step = divmod(finished, schedule.steps_per_epoch)
    run.position = replace(
        run.position,
        step=finished,
        epoch=epoch,
        epoch_step=epoch_step,
        metered_train_tokens=run.position.metered_train_tokens + launched.tokens,
        loss=loss,
    )
    record = StepRecord(
        step=finished,
        loss=loss,
        learning_rate=launched.learning_rate,
        grad_norm=norm,
        train_tokens=launched.tokens,
        balancing_loss=None if run.model.routers is None else balancing,
    )
    run.progress.add(record, launched.started_s, time.monotonic())


def _diverged(run: Run, launched: Launched, loss: float, norm: float, bound: float) -> Failure:
    return user_failure(
        "TRAINING_INPUT_INVALID",
        f"training diverged at step {launched.step + 1}: loss {loss:.6g} (with these settings at most {bound:.6g} is "
        f"sound), gradient norm {norm:.6g}, learning rate {launched.learning_rate:.3g}; {kept_checkpoint(run)}; lower "
        "the learning rate or raise the warm-up",
    )


def report_when_due(run: Run) -> None:
    if run.position.step in run.inputs.schedule.report_set:
        run.progress.flush(run.position)
