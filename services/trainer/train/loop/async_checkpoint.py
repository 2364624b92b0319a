"""When a run saves a checkpoint: tensors are copied aside at once, and files are written while the next steps run.

A checkpoint is reported, and counts, once it is committed. One is written at a time. The next one, an evaluation, the
export and every end of a run wait for it, and a write that failed ends the run there. It knows no file format.
"""

from concurrent.futures import Future
from dataclasses import asdict

from services.trainer.train.checkpoint.writer import prune_checkpoints, save_checkpoint, set_aside
from services.trainer.train.disk.durable import DiskFull
from services.trainer.train.loop.early_stopping import best_to_attach
from services.trainer.train.loop.state import PendingCheckpoint, Run
from services.trainer.train.runtime.background import begin

# Copies of more than this take memory that the run may need: then the run waits for the files.
ASIDE_BYTES_MAX = 8 * 1024**3


def checkpoint_when_due(run: Run) -> None:
    """Comes after the report and the evaluations of its step, so that everything before a checkpoint was reported
    before it."""
    inputs, position = run.inputs, run.position
    asked = True if position.stopped_early else inputs.schedule.checkpoints.get(position.step)
    if asked is None:
        return
    settle_checkpoint(run)
    tensors = set_aside(run.model, run.optimizer)
    # Sharded weights are written by all processes together.
    behind = run.group.leads and not run.group.sharded and tensors.size_bytes <= ASIDE_BYTES_MAX
    write = save_checkpoint(
        inputs.checkpoints,
        position,
        inputs.identity,
        run.model,
        tensors.copied() if behind else tensors,
        inputs.spec,
        machine=run.machine,
        learning_rate=run.optimizer.param_groups[0]["lr"],
        asked=asked,
        attached=run.attachments | best_to_attach(run),
        group=run.group,
    )
    if behind:
        written = begin("checkpoint", write)
    else:
        written = Future()
        written.set_result(write())
    run.pending_checkpoint = PendingCheckpoint(step=position.step, loss=position.loss, asked=asked, written=written)
    if not behind or position.step == inputs.schedule.total_steps or position.stopped_early:
        settle_checkpoint(run)


def settle_checkpoint(run: Run, *, wait: bool = True) -> None:
    """Reports the checkpoint under way once it is committed. Without `wait` it only does so if that is the case by now.
    Raises what its writing raised."""
    pending = run.pending_checkpoint
    if pending is None or not (wait or pending.written.done()):
        return
    run.pending_checkpoint = None
    saved = pending.written.result()
    run.last_checkpoint_step = pending.step
    run.emit(
        "checkpoint",
        step=pending.step,
        path=str(saved.path),
        files=[asdict(file) for file in saved.files],
        manifest_sha256=saved.manifest_sha256,
        asked=pending.asked,
        loss=pending.loss,
    )
    if run.group.leads:
        prune_checkpoints(run.inputs.checkpoints, run.inputs.spec.keep_last)


def kept_checkpoint(run: Run) -> str:
    """A clause for messages: the checkpoint from which a run that diverged can go on."""
    settle_checkpoint(run)
    kept = run.last_checkpoint_step
    return f"the last good checkpoint is at step {kept}" if kept is not None else "there is no checkpoint yet"


def settle_at_the_end(run: Run) -> None:
    """Waits for the checkpoint under way when a run ends for another reason. A full disk is then only a warning."""
    try:
        settle_checkpoint(run)
    except DiskFull as error:
        run.emit(
            "warning", code="CHECKPOINT_DISCARDED", message=f"{error.filename} could not be written: the disk is full"
        )
