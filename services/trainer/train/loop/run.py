"""The run: prepare, start or resume, step, evaluate, report, checkpoint, export, prove, finish.

It knows neither who started it nor who is billed. It emits events and obeys `stopping`.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from services.trainer.train.checkpoint.position import Position
from services.trainer.train.data.run_inputs import prepare_inputs
from services.trainer.train.disk.durable import DiskFull
from services.trainer.train.loop.async_checkpoint import checkpoint_when_due, settle_at_the_end, settle_checkpoint
from services.trainer.train.loop.evaluation import evaluate_before_the_first_step, evaluate_when_due
from services.trainer.train.loop.finish import export_and_prove
from services.trainer.train.loop.start_run import set_up_torch, start_run
from services.trainer.train.loop.state import Run
from services.trainer.train.loop.step import report_when_due, settle_step, train_step
from services.trainer.train.memory.fit import fit_to_devices
from services.trainer.train.memory.out_of_memory import too_large_when_full
from services.trainer.train.runtime.event_stream import Emit
from services.trainer.train.runtime.process_group import ALONE, Group
from services.trainer.train.settings.failures import Failure, Stopped, platform_failure
from services.trainer.train.settings.spec import Spec


def train(spec: Spec, workdir: Path, emit: Emit, stopping: Callable[[], bool], group: Group = ALONE) -> None:
    """Runs to the end or raises Failure. When `stopping` turns true on any process of the group, all of them finish the
    current step, and the run emits `stopped`."""
    set_up_torch(spec)
    inputs = prepare_inputs(spec, workdir, emit)
    layout = fit_to_devices(inputs, group)
    if layout is not None:
        group = replace(group, sharded=layout.parallelism == "sharded")
    with too_large_when_full("before the first step"):
        run = start_run(inputs, emit, lambda: group.any(stopping()), group, layout)
    try:
        evaluate_before_the_first_step(run)
        for step in range(run.position.step, inputs.schedule.total_steps):
            if run.position.stopped_early:
                break
            if run.stopping():
                settle_step(run)
                raise Stopped
            train_step(run, step)
            settle_checkpoint(run, wait=False)
            if step + 1 in inputs.schedule.stops:
                settle_step(run)
                report_when_due(run)
                evaluate_when_due(run)
                checkpoint_when_due(run)
        settle_checkpoint(run)
        revision = export_and_prove(run)
    except Stopped:
        settle_at_the_end(run)
        run.progress.flush(run.position, partial=True)
        emit("stopped", total_steps=inputs.schedule.total_steps, **_metered(run.position))
        return
    except Failure as failure:
        if failure.kind == "user":
            # Final for the job, so the last range may end anywhere. After a failure of ours the range is done again.
            run.progress.flush(run.position, partial=True)
        settle_at_the_end(run)
        failure.step, failure.last_checkpoint_step = run.position.step, run.last_checkpoint_step
        raise
    except DiskFull as error:
        raise _disk_full(run, error) from error
    emit(
        "finished",
        total_steps=inputs.schedule.total_steps,
        final_loss=run.position.loss,
        validation_loss=run.position.validation_loss,
        stopped_early=run.position.stopped_early,
        best_step=run.position.best_step,
        best_loss=run.position.best_loss,
        revision=revision,
        **_metered(run.position),
    )


def _disk_full(run: Run, error: DiskFull) -> Failure:
    """The platform's fault, and it may pass: another attempt goes on from the last checkpoint, which nothing has
    touched."""
    kept = run.last_checkpoint_step
    failure = platform_failure(
        "TRAINING_FAILED",
        f"the disk is full: {error.filename} could not be written after step {run.position.step}; "
        + (f"the checkpoint at step {kept} is kept" if kept is not None else "there is no checkpoint yet"),
        {"cause": "disk_full"},
    )
    failure.step, failure.last_checkpoint_step = run.position.step, kept
    return failure


def _metered(position: Position) -> dict[str, int]:
    return {
        "step": position.step,
        "train_tokens": position.metered_train_tokens,
        "validation_tokens": position.metered_validation_tokens,
    }
