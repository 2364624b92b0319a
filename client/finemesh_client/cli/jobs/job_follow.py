"""A live view of a running job: state, bar, loss, speed and ETA. It only draws what the watch stream says."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from finemesh.tuning.v1 import tuning_job_event_pb2, tuning_job_pb2
from finemesh_client.cli.jobs.job_show import rewards_of
from finemesh_client.cli.output import progress_console, state
from finemesh_client.client import Client

EVENT = tuning_job_event_pb2.TuningJobEventKind
QUIET_EVENTS = {tuning_job_event_pb2.TUNING_JOB_EVENT_KIND_METRICS}


def eta(seconds: float) -> str:
    """`1m05s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def status_text(job: tuning_job_pb2.TuningJob) -> str:
    """The line beside the bar."""
    p = job.progress
    if job.state == tuning_job_pb2.TUNING_JOB_STATE_QUEUED:
        return f"waiting for {job.queue.waiting_for}" if job.queue.waiting_for else "in the queue"
    if not p.step:
        return ""
    parts = [f"loss {p.training_loss:.4f}"]
    if p.HasField("validation_loss"):
        parts.append(f"held-out {p.validation_loss:.4f}")
    if p.HasField("reward_accuracy"):
        parts.append(f"rewards {rewards_of(p)}")
    parts.append(f"{p.tokens_per_second:,.0f} tok/s")
    if p.HasField("remaining_s"):
        parts.append(f"ETA {eta(p.remaining_s)}")
    return "  ".join(parts)


async def watch_job(mesh: Client, name: str, after_sequence: int = 0) -> tuning_job_pb2.TuningJob:
    """Draws the job until it ends and returns it."""
    job = tuning_job_pb2.TuningJob()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}", markup=False),
    )
    with Progress(*columns, console=progress_console) as bar:
        task = bar.add_task("...", total=None, status="")
        async for message in mesh.jobs.watch(name, after_sequence):
            job = message.tuning_job
            for event in message.events:
                if event.kind not in QUIET_EVENTS:
                    bar.console.print(f"  {event.message}", style="dim")
            bar.update(
                task,
                description=state(tuning_job_pb2.TuningJobState.Name(job.state), "TUNING_JOB_STATE_").markup,
                total=job.progress.step_count or None,
                completed=job.progress.step,
                status=status_text(job),
            )
    return job
