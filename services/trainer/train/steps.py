"""What happens at a step: the optimizer's update, and when it is due, the report.

It knows no evaluation, no checkpoint and no export.
"""

import math
import time
from dataclasses import replace

import torch

from services.trainer.train.failures import Failure, user_failure
from services.trainer.train.gradients import gradients_of_step
from services.trainer.train.optim import clip_gradients, learning_rate_at, set_learning_rate
from services.trainer.train.progress import StepRecord
from services.trainer.train.run import Run
from services.trainer.train.saving import settle_checkpoint


def train_step(run: Run, step: int) -> None:
    """One optimizer step on the sequences that the plan names. Raises Failure(user) before a poisoned update is applied."""
    spec, plan = run.inputs.spec, run.inputs.plan
    started_s = time.monotonic()
    rate = learning_rate_at(step, plan.total_steps, spec.learning_rate, spec.warmup_ratio, spec.schedule)
    loss, tokens = gradients_of_step(run, step)
    # The one look that the host takes at a step: at both numbers together, when all else of the step is under way.
    loss, norm = torch.stack(
        [
            torch.as_tensor(number, dtype=torch.float64, device=run.model.device)
            for number in (loss, clip_gradients(run.model.trainable.values(), spec.max_grad_norm))
        ]
    ).tolist()
    if not (math.isfinite(norm) and loss <= run.objective.loss_max(run.model.head_weight.shape[0])):
        raise _diverged(run, step, loss, norm, rate)
    set_learning_rate(run.optimizer, rate)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)

    finished = step + 1
    epoch, epoch_step = divmod(finished, plan.steps_per_epoch)
    run.position = replace(
        run.position,
        step=finished,
        epoch=epoch,
        epoch_step=epoch_step,
        metered_train_tokens=run.position.metered_train_tokens + tokens,
        loss=loss,
    )
    run.progress.add(
        StepRecord(step=finished, loss=loss, learning_rate=rate, grad_norm=norm, train_tokens=tokens),
        time.monotonic() - started_s,
    )


def report_when_due(run: Run) -> None:
    if run.position.step in run.inputs.plan.report_set:
        run.progress.flush(run.position)


def _diverged(run: Run, step: int, loss: float, norm: float, rate: float) -> Failure:
    settle_checkpoint(run)
    kept = run.last_checkpoint_step
    advice = f"the last good checkpoint is at step {kept}" if kept is not None else "there is no checkpoint yet"
    return user_failure(
        "TRAINING_INPUT_INVALID",
        f"training diverged at step {step + 1}: loss {loss}, gradient norm {norm}, learning rate {rate:.3g}; {advice}; "
        "lower the learning rate or raise the warm-up",
    )
