"""Whether a request can become a job: its fields, its files, its base model, and whether any node could ever fit it.

Nothing is stored here: a request that is refused leaves nothing behind.
"""

import asyncio
from dataclasses import dataclass
from datetime import timedelta

from chassis.errors import DomainError, FailedPrecondition, FieldViolation, InvalidArgument
from chassis.identity import Caller
from chassis.names import own_name
from finemesh.artifacts.v1 import artifact_pb2, file_artifact_service_pb2, model_artifact_service_pb2
from finemesh.files.v1 import file_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler import policy
from services.scheduler.analysis import Inputs
from services.scheduler.config import SchedulerSettings
from services.scheduler.convert import field_violations
from services.scheduler.convert_spec import spec_from
from services.scheduler.node_store import load_fleet
from services.scheduler.peers import Peers
from services.scheduler.spec import BaseLimits, TuningSpec, Violation, complete, violations_of
from services.scheduler.store import Store


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """A request that can become a job; `spec` is complete."""

    spec: TuningSpec
    inputs: Inputs
    parameter_count: int
    memory_bytes_min: int


class Admission:
    def __init__(self, store: Store, peers: Peers, settings: SchedulerSettings) -> None:
        self._store = store
        self._peers = peers
        self._settings = settings

    async def admit(self, message: tuning_job_pb2.TuningSpec, caller: Caller, job_id: str) -> Admitted:
        """Raises InvalidArgument with every violation, the refusal of a file or model, or JOB_TOO_LARGE."""
        given = spec_from(message)
        _refuse(violations_of(given))
        for field, name in (("training_file", given.training_file), ("validation_file", given.validation_file)):
            if name:
                own_name(file_pb2.File, name, caller, f"spec.{field}")
        base, training, validation = await asyncio.gather(
            self._resolve_base(given.base_model),
            self._resolve_file("training_file", given.training_file),
            self._resolve_file("validation_file", given.validation_file) if given.validation_file else _nothing(),
        )
        limits = BaseLimits(context_tokens_max=base.context_tokens_max, adapter_rank_max=base.adapter_rank_max)
        spec, violations = complete(given, limits, job_id)
        _refuse(violations)
        memory_bytes_min = policy.memory_bytes_min(base.parameter_count, all_weights=spec.lora is None)
        await self._refuse_too_large(spec, memory_bytes_min)
        return Admitted(
            spec=spec,
            inputs=Inputs(
                base_model=base.artifact,
                base_revision=base.revision,
                training_file=training,
                validation_file=validation,
            ),
            parameter_count=base.parameter_count,
            memory_bytes_min=memory_bytes_min,
        )

    async def _resolve_base(self, model_id: str) -> model_artifact_service_pb2.ResolveBaseModelResponse:
        request = model_artifact_service_pb2.ResolveBaseModelRequest(model_id=model_id)
        try:
            return await self._peers.models.ResolveBaseModel(request)
        except DomainError as error:
            raise _at("spec.base_model", error) from error

    async def _resolve_file(self, field: str, name: str) -> artifact_pb2.Artifact:
        request = file_artifact_service_pb2.ResolveFileRequest(name=name)
        try:
            response = await self._peers.files.ResolveFile(request)
        except DomainError as error:
            raise _at(f"spec.{field}", error) from error
        return response.artifact

    async def _refuse_too_large(self, spec: TuningSpec, memory_bytes_min: int) -> None:
        seen_since = self._store.now() - timedelta(seconds=self._settings.node_memory_s)
        fleet = await load_fleet(self._store.pool, seen_since, self._settings.nodes_max)
        need = policy.Need(owner="", count=spec.gpu_count, memory_bytes_min=memory_bytes_min)
        problem = policy.too_large(need, fleet.groups)
        if problem is not None:
            description = f"needs {problem.requested}; the largest node has {problem.largest}"
            raise FailedPrecondition(
                "JOB_TOO_LARGE",
                f"no registered node could ever run this job: it {description}; ask for fewer GPUs or a smaller model",
                violations=[FieldViolation("spec.gpu_count", description)],
                metadata={"requested": problem.requested, "largest": problem.largest},
            )


async def _nothing() -> None:
    return None


def _refuse(violations: list[Violation]) -> None:
    if violations:
        names = ", ".join(dict.fromkeys(violation.field for violation in violations))
        raise InvalidArgument(
            "INVALID_FIELD", f"the spec is not valid: {names}", violations=field_violations(violations)
        )


def _at(field: str, error: DomainError) -> DomainError:
    """The same error, with the field of the request that it is about."""
    return type(error)(
        error.reason,
        f"{field}: {error.message}",
        violations=error.violations or [FieldViolation(field, error.message)],
        metadata=error.metadata,
        retry_after_s=error.retry_after_s,
    )
