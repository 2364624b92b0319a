"""When a run evaluates, what it tells then and what it remembers of it. How a loss is made is evaluate.py's."""

import math
import time
from dataclasses import asdict, replace

from services.trainer.train.alive import sign_of_life
from services.trainer.train.early import judge_evaluation
from services.trainer.train.evaluate import evaluate
from services.trainer.train.failures import user_failure
from services.trainer.train.inputs import validation_batches
from services.trainer.train.memory import halve, release
from services.trainer.train.objective import Evaluation
from services.trainer.train.run import Run
from services.trainer.train.saving import kept_checkpoint, settle_checkpoint


def evaluate_before_the_first_step(run: Run) -> None:
    """The look that later losses are compared with, as evaluation 0. It is ours to make: no tokens are metered for it."""
    if run.position.step or not run.inputs.looks:
        return
    found = _evaluate(run, "the look at the validation file before the first step")
    run.position = replace(run.position, initial_validation_loss=found.loss)
    run.emit("evaluation", evaluation=0, step=0, epoch=0.0, validation_tokens=0, **asdict(found))


def evaluate_when_due(run: Run) -> None:
    inputs = run.inputs
    for number, at_step in inputs.plan.evaluations:
        if at_step != run.position.step or number <= run.position.evaluations_done or run.position.stopped_early:
            continue
        # Files are written one after another: a checkpoint on its way may carry the best weights that this one replaces.
        settle_checkpoint(run)
        started_s = time.monotonic()
        found = _evaluate(run, f"evaluation {number} after step {at_step}")
        duration_s = time.monotonic() - started_s
        run.position = replace(
            run.position,
            evaluations_done=number,
            validation_loss=found.loss,
            reward_accuracy=found.reward_accuracy,
            reward_margin=found.reward_margin,
            metered_validation_tokens=run.position.metered_validation_tokens + inputs.validation_tokens,
        )
        judge_evaluation(run, number, found.loss)
        run.progress.note_evaluation(duration_s)
        run.emit(
            "evaluation",
            evaluation=number,
            step=at_step,
            epoch=round(at_step / inputs.plan.steps_per_epoch, 4),
            validation_tokens=inputs.validation_tokens,
            duration_s=round(duration_s, 3),
            **asdict(found),
            best_step=run.position.best_step,
            best_loss=run.position.best_loss,
            stopped_early=run.position.stopped_early,
        )


def _evaluate(run: Run, name: str) -> Evaluation:
    """Raises Failure(user) for a loss that is no number, or one far beyond that of a model that guesses."""
    objective = run.validation_objective
    found = None
    while found is None:
        batches = validation_batches(run.inputs, run.group, run.evaluation_tokens)
        tell = sign_of_life(run.emit, "evaluating", len(batches))
        found = evaluate(run.model, objective, batches, run.stopping, tell, run.group)
        if found is None:
            _halve(run, name, divisible=batches.is_divisible)
    if not (math.isfinite(found.loss) and found.loss <= objective.loss_max(run.model.head_weight.shape[0])):
        raise user_failure(
            "TRAINING_INPUT_INVALID",
            f"training diverged: {name} came out with loss {found.loss}; {kept_checkpoint(run)}; "
            "lower the learning rate, or look for what is unlike the training file",
        )
    return found


def _halve(run: Run, name: str, *, divisible: bool) -> None:
    release()
    spent = run.evaluation_tokens
    run.evaluation_tokens = halve(spent, f"in {name}", divisible=divisible)
    run.position = replace(run.position, evaluation_tokens=run.evaluation_tokens)
    run.emit(
        "warning",
        code="OUT_OF_MEMORY_RETRIED",
        message=f"out of memory in {name}: micro-batches of evaluations have at most {run.evaluation_tokens} tokens from here on "
        f"instead of {spent}; it is done again",
    )
