"""How a tuning job, its quote and its ending look to people. It asks the mesh nothing."""

from __future__ import annotations

import typer
from rich.text import Text

from finemesh.tuning.v1 import tuning_job_pb2, tuning_service_pb2
from finemesh_client.billing import dollars
from finemesh_client.cli.jobs.price_terms import show_counts, show_outlook, show_terms, show_warnings, total
from finemesh_client.cli.output import console, fields, state, when
from finemesh_client.cli.runtime import EXIT_REFUSED
from finemesh_client.training_kinds import method_word

STATE_PREFIX = "TUNING_JOB_STATE_"


def show_quote(quote: tuning_service_pb2.QuoteTuningJobResponse) -> None:
    """A quote for people."""
    show_counts(quote.counts)
    show_outlook(quote.spec, quote.outlook)
    show_terms(f"quote (price book {quote.price_book_version})", quote.terms)
    available = f", available {dollars(quote.available_nanos_usd)}"
    console.print(total(quote.total_nanos_usd, quote.minimum_applied).append(available))


def show_job(job: tuning_job_pb2.TuningJob) -> None:
    """A job for people."""
    p = job.progress
    best = f"{p.best_validation_loss:.4f} after step {p.best_step}" if p.HasField("best_step") else ""
    fields(
        [
            ("name", job.name),
            ("state", state(tuning_job_pb2.TuningJobState.Name(job.state), STATE_PREFIX)),
            ("base model", job.spec.base_model),
            ("continues", job.spec.from_checkpoint),
            ("method", method_of(job.spec)),
            ("curves", f"{job.spec.integrations.wandb.base_url} {job.spec.integrations.wandb.project}".strip()),
            ("pushed to", job.spec.integrations.hub_push.repository),
            ("output model", job.output_model),
            ("revision", job.output_revision),
            ("model deleted", when(job.model_delete_time)),
            ("waits for", job.queue.waiting_for),
            ("progress", f"step {p.step} of {p.step_count}, loss {p.training_loss:.4f}" if p.step else ""),
            ("balancing loss", f"{p.balancing_loss:.4f}" if p.HasField("balancing_loss") else ""),
            ("held-out loss", f"{p.validation_loss:.4f}" if p.HasField("validation_loss") else ""),
            ("held-out rewards", rewards_of(p)),
            ("best held-out loss", f"{best}, stopped early" if best and p.stopped_early else best),
            ("quoted and held", dollars(job.quoted_nanos_usd) if job.quoted_nanos_usd else ""),
            ("attempts", str(job.attempt_count or "")),
            ("created", when(job.create_time)),
            ("started", when(job.start_time)),
            ("ended", when(job.end_time)),
            ("error", Text.assemble((job.error.reason, "red"), " ", job.error.message) if job.error.reason else ""),
        ]
    )
    show_warnings(job.outlook)


def method_of(spec: tuning_job_pb2.TuningSpec) -> str:
    """`dpo, adapter of rank 16`."""
    weights = "all weights" if spec.WhichOneof("weights") == "full" else f"adapter of rank {spec.lora.rank}"
    return f"{method_word(spec)}, {weights}"


def rewards_of(progress: tuning_job_pb2.TuningProgress) -> str:
    """`87 % right, margin 0.1234`, empty for a run without preferences."""
    if not progress.HasField("reward_accuracy"):
        return ""
    return f"{progress.reward_accuracy:.0%} right, margin {progress.reward_margin:.4f}"


def exit_unless_succeeded(ended: list[int]) -> None:
    """Exit code 1 for a job that was followed to another end than success."""
    if ended and ended != [tuning_job_pb2.TUNING_JOB_STATE_SUCCEEDED]:
        raise typer.Exit(EXIT_REFUSED)
