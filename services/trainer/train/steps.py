"""What happens at a step: the optimizer's update, and when it is due, the report.

The host launches a step without a look at the device and reads its numbers once the next one is under way. So an update that must
not be applied is left out on the device itself, and all that come after it. It knows no evaluation, no checkpoint and no export.
"""

import math
import time
from dataclasses import replace

import torch

from services.trainer.train.failures import Failure, user_failure
from services.trainer.train.gradients import gradients_of_step
from services.trainer.train.look import Look
from services.trainer.train.optim import clip_gradients, learning_rate_at, update
from services.trainer.train.progress import StepRecord
from services.trainer.train.run import Launched, Run
from services.trainer.train.saving import kept_checkpoint


def train_step(run: Run, step: int) -> None:
    """One optimizer step on the sequences that the plan names, and then a look at the one before it. Raises Failure(user) when
    that one diverged; its poisoned update was not applied, nor was any other after it."""
    try:
        launched = launch_step(run, step)
    finally:
        settle_step(run)
    run.launched = launched


def launch_step(run: Run, step: int) -> Launched:
    """Everything of a step but a look at its numbers."""
    spec, plan = run.inputs.spec, run.inputs.plan
    started_s = time.monotonic()
    rate = learning_rate_at(step, plan.total_steps, spec.learning_rate, spec.warmup_ratio, spec.schedule)
    loss, tokens = gradients_of_step(run, step)
    loss, norm = (
        torch.as_tensor(number, dtype=torch.float64, device=run.model.device)
        for number in (loss, clip_gradients(run.model.trainable.values(), spec.max_grad_norm))
    )
    # Neither is true of NaN.
    sound = (norm < math.inf) & (loss <= run.objective.loss_max(run.model.head_weight.shape[0]))
    run.poisoned = ~sound if run.poisoned is None else run.poisoned | ~sound
    update(run.optimizer, rate, skipped=run.poisoned)
    run.optimizer.zero_grad(set_to_none=True)
    return Launched(
        step=step, learning_rate=rate, tokens=tokens, started_s=started_s, numbers=Look(torch.stack([loss, norm]))
    )


def settle_step(run: Run) -> None:
    """Looks at the step that was launched last: what follows a step asks for that first. Raises Failure(user)."""
    launched = run.launched
    if launched is None:
        return
    run.launched = None
    loss, norm = launched.numbers.read()
    if not (math.isfinite(norm) and loss <= run.objective.loss_max(run.model.head_weight.shape[0])):
        raise _diverged(run, launched, loss, norm)
    plan = run.inputs.plan
    finished = launched.step + 1
    epoch, epoch_step = divmod(finished, plan.steps_per_epoch)
    run.position = replace(
        run.position,
        step=finished,
        epoch=epoch,
        epoch_step=epoch_step,
        metered_train_tokens=run.position.metered_train_tokens + launched.tokens,
        loss=loss,
    )
    record = StepRecord(
        step=finished, loss=loss, learning_rate=launched.learning_rate, grad_norm=norm, train_tokens=launched.tokens
    )
    run.progress.add(record, launched.started_s, time.monotonic())


def report_when_due(run: Run) -> None:
    if run.position.step in run.inputs.plan.report_set:
        run.progress.flush(run.position)


def _diverged(run: Run, launched: Launched, loss: float, norm: float) -> Failure:
    return user_failure(
        "TRAINING_INPUT_INVALID",
        f"training diverged at step {launched.step + 1}: loss {loss}, gradient norm {norm}, learning rate "
        f"{launched.learning_rate:.3g}; {kept_checkpoint(run)}; lower the learning rate or raise the warm-up",
    )
