"""finemesh.nodes.v1.NodeService: what agents say. Handlers check, convert, call and answer; the rules are in attempts.py."""

import re
from collections.abc import AsyncIterator

from google.protobuf.duration_pb2 import Duration

from chassis.errors import FieldViolation, InvalidArgument
from chassis.ids import Ids
from chassis.names import parse_name
from finemesh.nodes.v1 import node_service_pb2, node_service_pb2_grpc
from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler import lease_store
from services.scheduler.attempts import Attempts, ExportedModel, NewCheckpoint
from services.scheduler.config import SchedulerSettings
from services.scheduler.convert import (
    artifact_from,
    checkpoint_key_prefix,
    failure_from,
    metric_from,
    model_key_prefix,
    registration_from,
    size_bytes_of,
    usage_from,
)
from services.scheduler.domain import LeaseRef
from services.scheduler.heartbeat import Heartbeats
from services.scheduler.job_secrets import JobSecrets
from services.scheduler.node_store import NodeStore, lock_node
from services.scheduler.store import Store

_pb = node_service_pb2
_COMMIT = re.compile(r"[0-9a-f]{40,64}")


class NodeService(node_service_pb2_grpc.NodeServiceServicer):
    def __init__(
        self,
        store: Store,
        nodes: NodeStore,
        attempts: Attempts,
        heartbeats: Heartbeats,
        job_secrets: JobSecrets,
        ids: Ids,
        settings: SchedulerSettings,
    ) -> None:
        self._store = store
        self._nodes = nodes
        self._attempts = attempts
        self._heartbeats = heartbeats
        self._secrets = job_secrets
        self._ids = ids
        self._settings = settings

    async def RegisterNode(self, request: _pb.RegisterNodeRequest, context: object) -> _pb.RegisterNodeResponse:
        registration = registration_from(request, self._settings.node_devices_max)
        async with self._store.writing() as connection:
            known = await lock_node(connection, registration.node)
            await self._nodes.register(connection, registration)
            if known is not None and known != registration.incarnation:
                # Nothing of the old incarnation runs any more, so its leases need not run out.
                await lease_store.expire_node_leases(connection, registration.node, self._store.now())
                why = f"node {registration.node} started anew"
                for lease in await lease_store.list_node_leases(connection, registration.node):
                    if lease.ref is not None:
                        await self._attempts.lose(connection, lease.ref, why, lease.lease_token)
        return _pb.RegisterNodeResponse(
            heartbeat_interval=_duration(self._settings.heartbeat_interval_s),
            lease_duration=_duration(self._settings.lease_duration_s),
        )

    async def Heartbeat(
        self, request_iterator: AsyncIterator[_pb.HeartbeatRequest], context: object
    ) -> AsyncIterator[_pb.HeartbeatResponse]:
        async for response in self._heartbeats.converse(aiter(request_iterator), self._ids.uuid()):
            yield response

    async def StartAttempt(self, request: _pb.StartAttemptRequest, context: object) -> _pb.StartAttemptResponse:
        if request.hub_commit and not _COMMIT.fullmatch(request.hub_commit):
            raise _invalid("hub_commit", "must be 40 to 64 hexadecimal digits")
        await self._attempts.start(_ref(request.tuning_job, request.lease_token), request.hub_commit)
        return _pb.StartAttemptResponse()

    async def ReportProgress(self, request: _pb.ReportProgressRequest, context: object) -> _pb.ReportProgressResponse:
        count = len(request.metrics) + len(request.usage) + len(request.warnings)
        if count > self._settings.report_entries_max:
            raise _invalid("metrics", f"one report takes at most {self._settings.report_metrics_max} of each kind")
        await self._attempts.report(
            _ref(request.tuning_job, request.lease_token),
            [metric_from(metric) for metric in request.metrics],
            [usage_from(usage, index) for index, usage in enumerate(request.usage)],
            [warning[:1000] for warning in request.warnings],
        )
        return _pb.ReportProgressResponse()

    async def CommitCheckpoint(
        self, request: _pb.CommitCheckpointRequest, context: object
    ) -> _pb.CommitCheckpointResponse:
        ref = _ref(request.tuning_job, request.lease_token)
        checkpoint = request.checkpoint
        prefix = checkpoint_key_prefix(ref.project_id, ref.job_id)
        _require_key("checkpoint.artifact.key", checkpoint.artifact.key, prefix)
        if checkpoint.step < 0 or not checkpoint.manifest_sha256 or not checkpoint.artifact.files:
            raise _invalid("checkpoint", "needs a step, a manifest_sha256 and files")
        obsolete = await self._attempts.commit(
            ref,
            NewCheckpoint(
                step=checkpoint.step,
                manifest_sha256=checkpoint.manifest_sha256,
                size_bytes=size_bytes_of(checkpoint.artifact),
                artifact=checkpoint.artifact.SerializeToString(deterministic=True),
                asked=checkpoint.asked,
            ),
        )
        return _pb.CommitCheckpointResponse(obsolete=[artifact_from(artifact) for artifact in obsolete])

    async def FetchJobSecrets(
        self, request: _pb.FetchJobSecretsRequest, context: object
    ) -> _pb.FetchJobSecretsResponse:
        found = await self._secrets.fetch(_ref(request.tuning_job, request.lease_token))
        return _pb.FetchJobSecretsResponse(secrets=found)

    async def FinishAttempt(self, request: _pb.FinishAttemptRequest, context: object) -> _pb.FinishAttemptResponse:
        ref = _ref(request.tuning_job, request.lease_token)
        match request.WhichOneof("result"):
            case "succeeded":
                await self._attempts.succeed(ref, _exported(request.succeeded, ref))
            case "failed":
                failure = failure_from(request.failed.error)
                await self._attempts.fail(ref, failure, retryable=request.failed.retryable)
            case "stopped":
                await self._attempts.stop(ref, request.stopped.step)
            case _:
                raise _invalid("result", "is missing; say how the attempt ended")
        return _pb.FinishAttemptResponse()


def _exported(message: _pb.AttemptSucceeded, ref: LeaseRef) -> ExportedModel:
    if message.kind not in ("adapter", "full"):
        raise _invalid("succeeded.kind", f"must be `adapter` or `full`; got {message.kind[:40]!r}")
    if not message.revision or not message.model.files:
        raise _invalid("succeeded", "needs a revision and the model's files")
    _require_key("succeeded.model.key", message.model.key, model_key_prefix(ref.project_id))
    return ExportedModel(
        revision=message.revision,
        kind=message.kind,
        adapter_rank=message.adapter_rank,
        lineage=dict(message.lineage),
        artifact=message.model.SerializeToString(deterministic=True),
        stopped_early=message.stopped_early,
        step=message.step,
    )


def _ref(tuning_job: str, lease_token: int) -> LeaseRef:
    parts = parse_name(tuning_job_pb2.TuningJob, tuning_job, "tuning_job")
    return LeaseRef(project_id=parts["project"], job_id=parts["tuning_job"], lease_token=lease_token)


def _require_key(field: str, key: str, prefix: str) -> None:
    """Files of one project never lie, or are deleted, under another one's keys."""
    if not key.startswith(prefix) or ".." in key:
        raise _invalid(field, f"must begin with {prefix}")


def _invalid(field: str, description: str) -> InvalidArgument:
    return InvalidArgument("INVALID_FIELD", f"{field} {description}", violations=[FieldViolation(field, description)])


def _duration(seconds: float) -> Duration:
    message = Duration()
    message.FromMilliseconds(round(seconds * 1000))
    return message
