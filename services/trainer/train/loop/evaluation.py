"""When a run evaluates, how well it does on the validation rows, and what it emits and remembers of that.

Dropout is off, and no random state is touched. It knows no optimizer and no file.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

import torch

from services.trainer.train.data.batches.file_batches import FileBatches
from services.trainer.train.data.batches.micro_batch import MicroBatch
from services.trainer.train.data.batches.run_batches import batches_of_file, validation_batches
from services.trainer.train.loop.async_checkpoint import kept_checkpoint, settle_checkpoint
from services.trainer.train.loop.divergence import look_ahead
from services.trainer.train.loop.early_stopping import judge_evaluation
from services.trainer.train.loop.state import Run
from services.trainer.train.losses.objective import Evaluation, Objective, is_sound
from services.trainer.train.memory.out_of_memory import fits, halve, release
from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.runtime.event_stream import sign_of_life
from services.trainer.train.runtime.process_group import ALONE, Group
from services.trainer.train.settings.failures import Stopped, user_failure


def evaluate_before_the_first_step(run: Run) -> None:
    """Evaluation 0, with which later losses are compared. The platform asks for it, so no tokens are metered."""
    if run.position.step or not run.inputs.evaluates:
        return
    found = _evaluate(run, "the look at the validation file before the first step")
    run.position = replace(run.position, initial_validation_loss=found.loss)
    run.emit("evaluation", evaluation=0, step=0, epoch=0.0, validation_tokens=0, **asdict(found))


def evaluate_when_due(run: Run) -> None:
    inputs = run.inputs
    for number, at_step in inputs.schedule.evaluations:
        if at_step != run.position.step or number <= run.position.evaluations_done or run.position.stopped_early:
            continue
        # Files are written one after another: a checkpoint on its way may carry the best weights that this one
        # replaces.
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
            epoch=round(at_step / inputs.schedule.steps_per_epoch, 4),
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
    scored = None
    while scored is None:
        batches = validation_batches(run.inputs, run.group, run.evaluation_tokens)
        report = sign_of_life(run.emit, "evaluating", len(batches))
        if _look_ahead(run):
            scored = evaluate(run.model, objective, batches, run.stopping, report, run.group)
        if scored is None:
            _halve(run, name, divisible=batches.is_divisible)
    found, bound = scored
    if not (math.isfinite(found.loss) and is_sound(found.loss, bound)):
        raise user_failure(
            "TRAINING_INPUT_INVALID",
            f"training diverged: {name} came out with loss {found.loss:.6g}, and with these settings at most "
            f"{bound:.6g} is sound; {kept_checkpoint(run)}; "
            "lower the learning rate, or look for what is unlike the training file",
        )
    return found


def _look_ahead(run: Run) -> bool:
    """False when memory ran out on one of the processes."""
    rows = run.inputs.validation_mismatched
    if rows is None:
        return True
    batches = batches_of_file(run.inputs, rows, run.group, run.evaluation_tokens)
    before_stop = _unless_stopping(batches, run.stopping)
    return look_ahead(run.model, run.validation_objective, before_stop, batches.idle, run.group)


def evaluate(
    model: CausalModel,
    objective: Objective,
    batches: FileBatches,
    stopping: Callable[[], bool],
    report: Callable[[int], None],
    group: Group = ALONE,
) -> tuple[Evaluation, float] | None:
    """Means over the batches of all processes, and what the loss is at most for a sound model; None when memory ran
    out. `report` is called after each batch. Raises Stopped between batches."""
    sums: list[list[float]] = []
    guess_nats = math.log(model.head_weight.shape[0])

    def score(batch: MicroBatch) -> None:
        sums.append([*objective.sums(model, batch), float(objective.bound_sum(batch, guess_nats))])
        report(1)

    model.module.eval()
    try:
        with torch.no_grad():
            enough = fits(model, group, _unless_stopping(batches, stopping), score, batches.idle)
    finally:
        model.module.train()
    if not enough:
        return None
    *totals, bound = group.total([sum(column) for column in zip(*sums, strict=True)])
    return objective.evaluation(totals), bound / totals[-1]


def _unless_stopping(batches: FileBatches, stopping: Callable[[], bool]) -> Iterator[MicroBatch]:
    for batch in batches:
        if stopping():
            raise Stopped
        yield batch


def _halve(run: Run, name: str, *, divisible: bool) -> None:
    release()
    spent = run.evaluation_tokens
    run.evaluation_tokens = halve(spent, f"in {name}", divisible=divisible)
    run.position = replace(run.position, evaluation_tokens=run.evaluation_tokens)
    run.emit(
        "warning",
        code="OUT_OF_MEMORY_RETRIED",
        message=f"out of memory in {name}: micro-batches of evaluations have at most {run.evaluation_tokens} tokens "
        f"from here on instead of {spent}; it is done again",
    )
