"""Finds the weights that a run continues from: what an earlier job of the project shipped, or one of its kept checkpoints.

Whether they fit the request is spec_defaults.py's to say.
"""

from collections.abc import Mapping
from typing import Any

from chassis.db.pool import Connection, Pool
from chassis.db.queries import affected
from chassis.errors import DomainError, FailedPrecondition, FieldViolation, NotFound
from finemesh.nodes.v1 import node_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler.convert import artifact_from, job_name
from services.scheduler.convert_spec import spec_from
from services.scheduler.lifecycle import JobState
from services.scheduler.origin import Origin, OriginName
from services.scheduler.store import QUERIES

FIELD = "spec.from_checkpoint"
_NEWEST = -1


async def find_origin(pool: Pool, project_id: str, name: OriginName) -> Origin:
    """Raises NotFound for what this project does not have, FailedPrecondition for a job that has shipped nothing yet."""
    row = await _row_of(pool, project_id, name, FIELD)
    weights = node_pb2.StartWeights(tuning_job=job_name(project_id, row["job_id"]))
    step = name.step
    if step is None and JobState(row["state"]) is not JobState.SUCCEEDED:
        raise _refusal(
            FailedPrecondition,
            "STATE_CONFLICT",
            f"{row['job_id']} is {row['state']} and has shipped no model; name one of its checkpoints: {row['job_id']}:<step>",
        )
    if step is None and row["output_artifact"] is not None:
        weights.revision = row["output_revision"]
        weights.artifact.CopyFrom(artifact_from(row["output_artifact"]))
    else:
        # A job that ended before models were kept with their jobs: its last checkpoint is what it shipped.
        wanted = _NEWEST if step is None else step
        kept = await QUERIES.get_kept_checkpoint(pool, project_id=project_id, job_id=row["job_id"], step=wanted)
        if kept is None:
            raise _refusal(
                NotFound, "NOT_FOUND", f"{row['job_id']} has no kept checkpoint of that step; see ListCheckpoints"
            )
        step = kept["step"]
        weights.step = kept["step"]
        weights.artifact.CopyFrom(artifact_from(kept["artifact"]))
    spec = spec_from(tuning_job_pb2.TuningSpec.FromString(row["spec"]))
    return Origin(
        job_id=row["job_id"],
        step=step,
        base_model=row["base_model"],
        base_revision=row["base_revision"],
        lora=spec.lora,
        start_weights=weights.SerializeToString(deterministic=True),
    )


async def base_model_of(pool: Pool, project_id: str, name: OriginName, field: str) -> str:
    """What the job named in `field` tunes, whatever has become of it. Raises NotFound for what this project does not have."""
    base_model: str = (await _row_of(pool, project_id, name, field))["base_model"]
    return base_model


async def _row_of(pool: Pool, project_id: str, name: OriginName, field: str) -> Mapping[str, Any]:
    if name.project_id not in ("", project_id):
        raise _refusal(NotFound, "NOT_FOUND", "there is no such job in this project", field)
    row: Mapping[str, Any] | None = await QUERIES.get_origin(
        pool, project_id=project_id, job_id=name.job_id, output_name=name.output_name, namespace=name.namespace
    )
    if row is None:
        raise _refusal(NotFound, "NOT_FOUND", "there is no such job or model in this project", field)
    return row


async def keep(connection: Connection, project_id: str, origin: Origin) -> None:
    """From now on the checkpoint stays, whatever its job commits later. Raises NotFound when it was given up meanwhile."""
    if origin.step is None:
        return
    status = await QUERIES.keep_checkpoint(connection, project_id=project_id, job_id=origin.job_id, step=origin.step)
    if affected(status) == 0:
        raise _refusal(
            NotFound, "NOT_FOUND", f"the checkpoint of {origin.job_id} at step {origin.step} is no longer kept"
        )


def _refusal(kind: type[DomainError], reason: str, description: str, field: str = FIELD) -> DomainError:
    return kind(reason, f"{field}: {description}", violations=[FieldViolation(field, description)])
