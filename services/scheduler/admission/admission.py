"""Not pure: database, gRPC. Whether a request can become a job: its fields, its files, its base model, its size.

Nothing is stored here: a request that is refused leaves nothing behind.
"""

import asyncio
from dataclasses import dataclass, replace

from chassis.errors import (
    AlreadyExists,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    NotFound,
    Unimplemented,
    invalid,
)
from chassis.identity import Caller
from chassis.names import own_name
from finemesh.artifacts.v1 import artifact_pb2, file_artifact_service_pb2, model_artifact_service_pb2
from finemesh.files.v1 import file_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler.admission.continuation import base_model_of, find_origin
from services.scheduler.admission.dataset_counts import Inputs
from services.scheduler.admission.peer_errors import ask_about
from services.scheduler.config import SchedulerSettings
from services.scheduler.database import Database
from services.scheduler.jobs.convert import encoded
from services.scheduler.peers import Peers
from services.scheduler.placement import policy
from services.scheduler.placement.store import AllocationStore
from services.scheduler.spec import integrations
from services.scheduler.spec.convert import (
    base_facts_from_proto,
    hub_start_to_proto,
    spec_from_proto,
    violations_to_errors,
)
from services.scheduler.spec.defaults import complete
from services.scheduler.spec.integrations import ProvidedSecrets
from services.scheduler.spec.origin import Origin, OriginName, parse_origin
from services.scheduler.spec.tuning_limits import Limits, LimitsTable
from services.scheduler.spec.tuning_spec import TuningSpec, Violation
from services.scheduler.spec.violations import violations_of

MODEL_CHARS_MAX = 400
_NAME_USES = {
    model_artifact_service_pb2.MODEL_NAME_USE_BASE_MODEL: "a base model",
    model_artifact_service_pb2.MODEL_NAME_USE_TUNED_MODEL: "a tuned model",
    model_artifact_service_pb2.MODEL_NAME_USE_ENDPOINT: "an endpoint",
}
Resolved = model_artifact_service_pb2.ResolveBaseModelResponse


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """A request that can become a job; `spec` is complete. `origin` is what the run continues from."""

    spec: TuningSpec
    inputs: Inputs
    parameter_count: int
    memory_bytes_min: int
    origin: Origin | None

    @property
    def start_weights(self) -> bytes | None:
        """An encoded finemesh.nodes.v1.StartWeights; None starts from the base model's own."""
        if self.spec.from_hub is not None:
            return encoded(hub_start_to_proto(self.spec.from_hub))
        return None if self.origin is None else self.origin.start_weights

    @property
    def start_model_job_id(self) -> str | None:
        """The job whose model is started from; None for a checkpoint, and for what no job of ours made."""
        return None if self.origin is None or self.origin.step is not None else self.origin.job_id


class Admission:
    def __init__(self, database: Database, peers: Peers, limits: LimitsTable, settings: SchedulerSettings) -> None:
        self._database = database
        self._peers = peers
        self._limits = limits
        self._settings = settings

    async def admit(
        self, message: tuning_job_pb2.TuningSpec, caller: Caller, job_id: str, provided: ProvidedSecrets | None = None
    ) -> Admitted:
        """Raises InvalidArgument with every violation, the refusal of a file or model, or JOB_TOO_LARGE.

        A quote provides no secrets (None), and none is asked of it.
        """
        given = spec_from_proto(message)
        allowed = self._settings.wandb_urls_allowed
        _refuse(
            violations_of(given)
            + integrations.violations_of(
                given.integrations,
                provided,
                urls_allowed=allowed,
                wandb_offline=self._settings.wandb_offline,
                reads_hub=given.from_hub is not None,
            )
        )
        asked = integrations.completed(given.integrations, job_id=job_id, urls_allowed=allowed)
        given = replace(given, integrations=asked)
        for field, name in (("training_file", given.training_file), ("validation_file", given.validation_file)):
            if name:
                own_name(file_pb2.File, name, caller, f"spec.{field}")
        origin = await self._origin(given.from_checkpoint, caller)
        base_model = given.base_model or (origin.base_model if origin else "")
        base, training, validation = await asyncio.gather(
            self._resolve_base(base_model, "spec.base_model"),
            self._resolve_file("training_file", given.training_file),
            self._resolve_file("validation_file", given.validation_file) if given.validation_file else _nothing(),
        )
        spec, violations = complete(given, self._limits_of(base_model, base), job_id, origin)
        if origin is not None and not violations and origin.base_revision != base.revision:
            description = f"{base_model} has another revision now than when {origin.job_id} was trained on it"
            violations.append(Violation(field="spec.from_checkpoint", description=description))
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
            origin=origin,
        )

    async def refuse_taken_name(self, namespace: str, output_name: str) -> None:
        """AlreadyExists when calls to the job's model would reach something else. Whoever takes the name later makes
        inference register the model with a number behind it."""
        model_id = f"{namespace}/{output_name}"
        request = model_artifact_service_pb2.LookUpModelNameRequest(model_id=model_id)
        try:
            use = (await self._peers.models.LookUpModelName(request)).use
        except Unimplemented:
            # An older inference, in the middle of an upgrade: the model then gets a number.
            return
        if use != model_artifact_service_pb2.MODEL_NAME_USE_UNSPECIFIED:
            what = _NAME_USES.get(use, "something else")
            raise AlreadyExists(
                "ALREADY_EXISTS",
                f"spec.output_name: {model_id} is {what} already, so the job's model could not have this name; choose "
                f"another output_name, or delete {what} of this name first",
                violations=[FieldViolation("spec.output_name", f"{model_id} is {what} already")],
                metadata={"model_id": model_id},
            )

    async def limits(self, model: str, caller: Caller) -> tuple[str, Limits, Resolved]:
        """The base model that `model` names, or that what it names was trained on, with its limits and its files."""
        name = parse_origin(model)
        if not model or len(model) > MODEL_CHARS_MAX:
            description = "give the id of a base model, or a job or model to continue from"
            raise invalid("model", description, message=f"model: {description}")
        if name is not None and (name.job_id or name.step is not None):
            return await self._limits_of_origin(name, caller)
        try:
            base = await self._resolve_base(model, "model")
            return model, self._limits_of(model, base), base
        except NotFound:
            if name is None:
                raise
            return await self._limits_of_origin(name, caller)

    async def _limits_of_origin(self, name: OriginName, caller: Caller) -> tuple[str, Limits, Resolved]:
        base_model = await base_model_of(self._database.pool, caller.tenant, name, "model")
        base = await self._resolve_base(base_model, "model")
        return base_model, self._limits_of(base_model, base), base

    def _limits_of(self, base_model: str, base: Resolved) -> Limits:
        return self._limits.of(base_model, base_facts_from_proto(base))

    async def _origin(self, from_checkpoint: str, caller: Caller) -> Origin | None:
        name = parse_origin(from_checkpoint) if from_checkpoint else None
        return None if name is None else await find_origin(self._database.pool, caller.tenant, name)

    async def _resolve_base(self, model_id: str, field: str) -> Resolved:
        request = model_artifact_service_pb2.ResolveBaseModelRequest(model_id=model_id)
        return await ask_about(field, self._peers.models.ResolveBaseModel(request))

    async def _resolve_file(self, field: str, name: str) -> artifact_pb2.Artifact:
        request = file_artifact_service_pb2.ResolveFileRequest(name=name)
        response = await ask_about(f"spec.{field}", self._peers.files.ResolveFile(request))
        return response.artifact

    async def _refuse_too_large(self, spec: TuningSpec, memory_bytes_min: int) -> None:
        fleet = await AllocationStore(self._database.pool).load_fleet(
            self._settings.node_memory_s, self._settings.nodes_max
        )
        problem = policy.too_large(policy.job_need("", spec.gpu_count, memory_bytes_min), fleet.groups)
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
            "INVALID_FIELD", f"the spec is not valid: {names}", violations=violations_to_errors(violations)
        )
