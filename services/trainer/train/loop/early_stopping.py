"""Early stopping: what an evaluation means for the run, and the weights of the best one, kept until they ship.

`judge` is pure, so that a run that was killed and goes on comes to the same end. Everything that it remembers is in the
position.
"""

import shutil
from dataclasses import replace
from pathlib import Path

from services.trainer.train.checkpoint.position import Position
from services.trainer.train.disk.durable import commit_folder
from services.trainer.train.loop.state import BEST, Run
from services.trainer.train.modeling.fsdp import whole
from services.trainer.train.modeling.trained_weights import read_trained_weights, weights_file, write_trained_weights
from services.trainer.train.settings.methods import EarlyStopping


def judge(position: Position, stopping: EarlyStopping, number: int, loss: float, *, total_steps: int) -> Position:
    """The position after evaluation `number` (from 1) with this loss. The best loss is the smallest one; an evaluation
    counts against the patience unless it is smaller than the best before it by more than `min_delta`, and after the
    warm-up only. Where several fall on one step, the first of them is the verdict on it. A run that has done all of its
    `total_steps` was not stopped early, whatever its last evaluation says: it is a completed one."""
    if position.judged_step == position.step:
        return position
    best = position.best_loss
    improved = best is None or loss < best - stopping.min_delta
    stale = 0 if improved or number <= stopping.warmup_evaluations else position.evaluations_without_gain + 1
    if best is None or loss < best:
        position = replace(position, best_loss=loss, best_step=position.step)
    return replace(
        position,
        judged_step=position.step,
        evaluations_without_gain=stale,
        stopped_early=stale >= stopping.patience and position.step < total_steps,
    )


def judge_evaluation(run: Run, number: int, loss: float) -> None:
    """Notes the evaluation in the position. The weights of a new best one are written aside on every node, because the
    node's processes read them there in the end."""
    stopping = run.inputs.spec.early_stopping
    if stopping is None:
        return
    before = run.position.best_loss
    run.position = judge(run.position, stopping, number, loss, total_steps=run.inputs.schedule.total_steps)
    if before is not None and not loss < before:
        return
    writes = run.group.local_rank == 0
    trained = whole(run.model.trainable, keep=writes) if run.group.sharded else None
    if writes:
        spec = run.inputs.spec
        commit_folder(
            run.inputs.workdir / BEST,
            lambda folder: write_trained_weights(run.model, spec, folder, trained),
            manifest=None,
        )
    run.group.wait()


def restore_best(run: Run, checkpoint: Path) -> None:
    """Brings the best weights so far back from a checkpoint: they lie beside its own, unless its own are the best."""
    spec = run.inputs.spec
    if spec.early_stopping is None or run.position.best_step is None:
        return
    name = weights_file(spec)
    beside = checkpoint / attached_name(run)
    if run.group.local_rank == 0:
        source = beside if beside.is_file() else checkpoint / name
        commit_folder(run.inputs.workdir / BEST, lambda folder: _copy(source, folder / name), manifest=None)
    run.group.wait()


def best_to_attach(run: Run) -> dict[str, Path]:
    """Files that a checkpoint has to carry besides its own weights, by their name in it."""
    position, spec = run.position, run.inputs.spec
    own_are_best = position.best_step == position.step and not run.group.sharded
    if spec.early_stopping is None or position.best_step is None or own_are_best:
        return {}
    return {attached_name(run): run.inputs.workdir / BEST / weights_file(spec)}


def ship_best(run: Run) -> None:
    """The model takes the weights of the best evaluation, to be exported."""
    if run.inputs.spec.early_stopping is not None and run.position.best_step not in (None, run.position.step):
        read_trained_weights(run.model, run.inputs.spec, run.inputs.workdir / BEST)


def attached_name(run: Run) -> str:
    return f"best_{weights_file(run.inputs.spec)}"


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
