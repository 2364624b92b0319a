"""finemesh.tuning.v1.TuningService: the public face of jobs. Handlers check, convert, call and answer."""

from collections.abc import AsyncIterator

from chassis.errors import invalid
from chassis.identity import current_caller
from chassis.names import own_name, own_parent
from chassis.paging import Pages
from finemesh.holds.v1 import hold_service_pb2
from finemesh.identity.v1 import identity_pb2
from finemesh.tuning.v1 import tuning_job_pb2, tuning_service_pb2, tuning_service_pb2_grpc
from services.scheduler.admission.admission import Admission
from services.scheduler.admission.dataset_counts import Analyzer
from services.scheduler.admission.dataset_preview import Previewer
from services.scheduler.admission.job_requests import JobRequests
from services.scheduler.admission.price_request import price_request
from services.scheduler.admission.run_outlook import look_ahead
from services.scheduler.admission.template_facts import TemplateFacts
from services.scheduler.api.convert import checkpoint_to_proto, job_event_to_proto
from services.scheduler.api.job_view import JobView
from services.scheduler.api.job_watch import Follower
from services.scheduler.database import Database
from services.scheduler.jobs.convert import unknown_job
from services.scheduler.jobs.job import JobRef
from services.scheduler.jobs.store import JobStore
from services.scheduler.peers import Peers
from services.scheduler.spec.convert import limits_to_proto, secrets_from_proto, spec_to_proto

REQUEST_ID_CHARS_MAX = 128
_pb = tuning_service_pb2


class TuningService(tuning_service_pb2_grpc.TuningServiceServicer):
    def __init__(
        self,
        database: Database,
        admission: Admission,
        analyzer: Analyzer,
        peers: Peers,
        requests: JobRequests,
        view: JobView,
        follower: Follower,
        previewer: Previewer,
        templates: TemplateFacts,
        pages: Pages,
    ) -> None:
        self._pages = pages
        self._database = database
        self._admission = admission
        self._analyzer = analyzer
        self._peers = peers
        self._requests = requests
        self._view = view
        self._follower = follower
        self._previewer = previewer
        self._templates = templates

    async def QuoteTuningJob(self, request: _pb.QuoteTuningJobRequest, context: object) -> _pb.QuoteTuningJobResponse:
        caller = current_caller()
        own_parent(identity_pb2.Project, request.parent, caller)
        admitted = await self._admission.admit(request.spec, caller, job_id="")
        counts = await self._analyzer.counts(admitted.spec, admitted.inputs, caller, for_job=False)
        outlook = look_ahead(admitted.spec, counts)
        wanted = hold_service_pb2.QuoteWorkRequest(
            organization_id=caller.account, price=price_request(admitted.spec, counts, admitted.parameter_count)
        )
        answer = await self._peers.holds.QuoteWork(wanted)
        price = answer.quote
        return _pb.QuoteTuningJobResponse(
            counts=counts,
            total_nanos_usd=price.total_nanos_usd,
            price_book_version=price.price_book_version,
            terms=[
                _pb.QuoteTerm(
                    description=term.description,
                    quantity=term.quantity,
                    nanos_usd_per_million=term.nanos_usd_per_million,
                    amount_nanos_usd=term.amount_nanos_usd,
                )
                for term in price.terms
            ],
            available_nanos_usd=answer.available_nanos_usd,
            spec=spec_to_proto(admitted.spec),
            minimum_applied=price.minimum_applied,
            parameter_count=admitted.parameter_count,
            outlook=outlook,
        )

    async def PreviewDataset(self, request: _pb.PreviewDatasetRequest, context: object) -> _pb.PreviewDatasetResponse:
        caller = current_caller()
        own_parent(identity_pb2.Project, request.parent, caller)
        return _pb.PreviewDatasetResponse(preview=await self._previewer.preview(request, caller))

    async def CreateTuningJob(
        self, request: _pb.CreateTuningJobRequest, context: object
    ) -> _pb.CreateTuningJobResponse:
        caller = current_caller()
        parts = own_parent(identity_pb2.Project, request.parent, caller)
        if len(request.request_id) > REQUEST_ID_CHARS_MAX:
            raise invalid("request_id", f"must be at most {REQUEST_ID_CHARS_MAX} characters")
        job_id = await self._requests.create(
            caller, request.spec, secrets_from_proto(request.secrets), request.request_id
        )
        ref = JobRef(project_id=parts["project"], job_id=job_id)
        return _pb.CreateTuningJobResponse(tuning_job=await self._shown(ref))

    async def GetTuningJob(self, request: _pb.GetTuningJobRequest, context: object) -> _pb.GetTuningJobResponse:
        return _pb.GetTuningJobResponse(tuning_job=await self._shown(_ref(request.name)))

    async def ListTuningJobs(self, request: _pb.ListTuningJobsRequest, context: object) -> _pb.ListTuningJobsResponse:
        project_id = own_parent(identity_pb2.Project, request.parent, current_caller())["project"]
        page = self._pages.read(request, scope=f"tuningJobs:{project_id}", kinds=(str,))
        jobs = await JobStore(self._database.pool).list_jobs(project_id, page.after(""), page.row_max)
        shown, token = page.cut(jobs, lambda job: (job.job_id,))
        return _pb.ListTuningJobsResponse(tuning_jobs=await self._view.many(shown), next_page_token=token)

    async def CancelTuningJob(
        self, request: _pb.CancelTuningJobRequest, context: object
    ) -> _pb.CancelTuningJobResponse:
        ref = _ref(request.name)
        await self._requests.cancel(ref)
        return _pb.CancelTuningJobResponse(tuning_job=await self._shown(ref))

    async def WatchTuningJob(
        self, request: _pb.WatchTuningJobRequest, context: object
    ) -> AsyncIterator[_pb.WatchTuningJobResponse]:
        ref = _ref(request.name)
        if request.after_sequence < 0:
            raise invalid("after_sequence", "must not be negative")
        async for response in self._follower.follow(ref, request.after_sequence):
            yield response

    async def ListTuningJobEvents(
        self, request: _pb.ListTuningJobEventsRequest, context: object
    ) -> _pb.ListTuningJobEventsResponse:
        ref = await self._existing(request.parent)
        page = self._pages.read(request, scope=f"tuningJobEvents:{ref.job_id}", kinds=(int,))
        events = await JobStore(self._database.pool).list_events(ref, page.after(0), page.row_max)
        shown, token = page.cut(events, lambda event: (event.sequence,))
        return _pb.ListTuningJobEventsResponse(
            events=[job_event_to_proto(event) for event in shown], next_page_token=token
        )

    async def ListCheckpoints(
        self, request: _pb.ListCheckpointsRequest, context: object
    ) -> _pb.ListCheckpointsResponse:
        ref = await self._existing(request.parent)
        page = self._pages.read(request, scope=f"checkpoints:{ref.job_id}", kinds=(int,))
        found = await JobStore(self._database.pool).list_checkpoints(ref, page.after(-1), page.row_max)
        shown, token = page.cut(found, lambda checkpoint: (checkpoint.step,))
        return _pb.ListCheckpointsResponse(
            checkpoints=[checkpoint_to_proto(each) for each in shown], next_page_token=token
        )

    async def GetTuningLimits(
        self, request: _pb.GetTuningLimitsRequest, context: object
    ) -> _pb.GetTuningLimitsResponse:
        caller = current_caller()
        own_parent(identity_pb2.Project, request.parent, caller)
        base_model, limits, base = await self._admission.limits(request.model, caller)
        return _pb.GetTuningLimitsResponse(limits=limits_to_proto(base_model, limits, await self._templates.of(base)))

    async def _shown(self, ref: JobRef) -> tuning_job_pb2.TuningJob:
        shown = await self._view.one(ref)
        if shown is None:
            raise unknown_job(ref)
        return shown

    async def _existing(self, parent: str) -> JobRef:
        """A list of a job that does not exist is NOT_FOUND, not empty."""
        ref = _ref(parent, "parent")
        if await JobStore(self._database.pool).get(ref) is None:
            raise unknown_job(ref)
        return ref


def _ref(name: str, field: str = "name") -> JobRef:
    parts = own_name(tuning_job_pb2.TuningJob, name, current_caller(), field)
    return JobRef(project_id=parts["project"], job_id=parts["tuning_job"])
