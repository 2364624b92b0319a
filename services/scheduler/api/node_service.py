"""finemesh.nodes.v1.NodeService: what agents say. Handlers check, convert, call and answer."""

import re
from collections.abc import AsyncIterator
from uuid import UUID

import structlog
from google.protobuf.duration_pb2 import Duration

from chassis.errors import invalid
from chassis.ids import Ids
from chassis.names import parse_name
from finemesh.nodes.v1 import node_service_pb2, node_service_pb2_grpc
from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler.attempts.attempts import Attempts
from services.scheduler.attempts.convert import (
    bad_checkpoint_from_proto,
    checkpoint_from_proto,
    metric_from_proto,
    model_from_proto,
    usage_from_proto,
)
from services.scheduler.attempts.reports import AttemptReports
from services.scheduler.config import SchedulerSettings
from services.scheduler.folders.convert import folder_to_proto
from services.scheduler.folders.job_folders import JobFolders
from services.scheduler.jobs.convert import artifact_from_bytes, failure_from_proto, job_ref
from services.scheduler.jobs.job import LeaseRef
from services.scheduler.jobs.job_secrets import JobSecrets
from services.scheduler.nodes.convert import assignment_to_proto, beat_from_proto, registration_from_proto
from services.scheduler.nodes.heartbeats import Heartbeats
from services.scheduler.nodes.node import Beat
from services.scheduler.nodes.registry import NodeRegistry
from services.scheduler.placement.lease_holders import LeaseHolders, require_node

log = structlog.get_logger(__name__)
WARNING_CHARS_MAX = 1000
_pb = node_service_pb2
_COMMIT = re.compile(r"[0-9a-f]{40,64}")


class NodeService(node_service_pb2_grpc.NodeServiceServicer):
    def __init__(
        self,
        nodes: NodeRegistry,
        heartbeats: Heartbeats,
        reports: AttemptReports,
        attempts: Attempts,
        job_secrets: JobSecrets,
        holders: LeaseHolders,
        folders: JobFolders,
        ids: Ids,
        settings: SchedulerSettings,
    ) -> None:
        self._nodes = nodes
        self._heartbeats = heartbeats
        self._reports = reports
        self._attempts = attempts
        self._secrets = job_secrets
        self._holders = holders
        self._folders = folders
        self._ids = ids
        self._settings = settings

    async def RegisterNode(self, request: _pb.RegisterNodeRequest, context: object) -> _pb.RegisterNodeResponse:
        require_node(request.node)
        await self._nodes.register(registration_from_proto(request, self._settings.node_devices_max))
        return _pb.RegisterNodeResponse(
            heartbeat_interval=_duration(self._settings.heartbeat_interval_s),
            lease_duration=_duration(self._settings.lease_duration_s),
        )

    async def Heartbeat(
        self, request_iterator: AsyncIterator[_pb.HeartbeatRequest], context: object
    ) -> AsyncIterator[_pb.HeartbeatResponse]:
        beats = _own_beats(request_iterator)
        async for assignments in self._heartbeats.converse(beats, self._ids.uuid()):
            yield _pb.HeartbeatResponse(assignments=[assignment_to_proto(each) for each in assignments])

    async def StartAttempt(self, request: _pb.StartAttemptRequest, context: object) -> _pb.StartAttemptResponse:
        if request.hub_commit and not _COMMIT.fullmatch(request.hub_commit):
            raise invalid("hub_commit", "must be 40 to 64 hexadecimal digits")
        await self._reports.start(await self._own(request.tuning_job, request.lease_token), request.hub_commit)
        return _pb.StartAttemptResponse()

    async def ReportProgress(self, request: _pb.ReportProgressRequest, context: object) -> _pb.ReportProgressResponse:
        count = len(request.metrics) + len(request.usage) + len(request.warnings)
        if count > self._settings.report_entries_max:
            raise invalid("metrics", f"one report takes at most {self._settings.report_metrics_max} of each kind")
        await self._reports.report(
            await self._own(request.tuning_job, request.lease_token),
            [metric_from_proto(metric) for metric in request.metrics],
            [usage_from_proto(usage, index) for index, usage in enumerate(request.usage)],
            [warning[:WARNING_CHARS_MAX] for warning in request.warnings],
        )
        return _pb.ReportProgressResponse()

    async def CommitCheckpoint(
        self, request: _pb.CommitCheckpointRequest, context: object
    ) -> _pb.CommitCheckpointResponse:
        ref = await self._own(request.tuning_job, request.lease_token)
        obsolete = await self._reports.commit(ref, checkpoint_from_proto(request.checkpoint, ref))
        return _pb.CommitCheckpointResponse(obsolete=[artifact_from_bytes(artifact) for artifact in obsolete])

    async def FetchJobSecrets(
        self, request: _pb.FetchJobSecretsRequest, context: object
    ) -> _pb.FetchJobSecretsResponse:
        found = await self._secrets.fetch(await self._own(request.tuning_job, request.lease_token))
        return _pb.FetchJobSecretsResponse(secrets=found)

    async def FinishAttempt(self, request: _pb.FinishAttemptRequest, context: object) -> _pb.FinishAttemptResponse:
        ref = await self._own(request.tuning_job, request.lease_token)
        match request.WhichOneof("result"):
            case "succeeded":
                await self._attempts.succeed(ref, model_from_proto(request.succeeded, ref))
            case "failed":
                failure = failure_from_proto(request.failed.error)
                await self._attempts.fail(
                    ref,
                    failure,
                    retryable=request.failed.retryable,
                    bad_checkpoint=bad_checkpoint_from_proto(request.failed),
                )
            case "stopped":
                await self._attempts.stop(ref, request.stopped.step)
            case _:
                raise invalid("result", "is missing; say how the attempt ended")
        return _pb.FinishAttemptResponse()

    async def ClaimJobFolders(
        self, request: _pb.ClaimJobFoldersRequest, context: object
    ) -> _pb.ClaimJobFoldersResponse:
        require_node(request.node)
        folders = await self._folders.claim(request.node)
        if folders:
            log.info("job_folders_claimed", node=request.node, jobs=[folder.ref.job_id for folder in folders])
        return _pb.ClaimJobFoldersResponse(folders=[folder_to_proto(folder) for folder in folders])

    async def FinishJobFolder(
        self, request: _pb.FinishJobFolderRequest, context: object
    ) -> _pb.FinishJobFolderResponse:
        require_node(request.node)
        try:
            claim = UUID(request.claim)
        except ValueError as error:
            raise invalid("claim", "must be what ClaimJobFolders answered") from error
        await self._folders.finish(job_ref(request.tuning_job), request.node, claim)
        return _pb.FinishJobFolderResponse()

    async def _own(self, tuning_job: str, lease_token: int) -> LeaseRef:
        """A lease of the node that calls."""
        await self._holders.require(lease_token)
        return _ref(tuning_job, lease_token)


async def _own_beats(requests: AsyncIterator[_pb.HeartbeatRequest]) -> AsyncIterator[Beat]:
    async for request in requests:
        require_node(request.node)
        yield beat_from_proto(request)


def _ref(tuning_job: str, lease_token: int) -> LeaseRef:
    parts = parse_name(tuning_job_pb2.TuningJob, tuning_job, "tuning_job")
    return LeaseRef(project_id=parts["project"], job_id=parts["tuning_job"], lease_token=lease_token)


def _duration(seconds: float) -> Duration:
    message = Duration()
    message.FromMilliseconds(round(seconds * 1000))
    return message
