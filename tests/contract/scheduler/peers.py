"""The services around the scheduler, scripted: files, models, analysis, prices and holds,
as their contracts promise them."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from chassis.errors import DomainError, NotFound, Unavailable, Unimplemented
from chassis.identity import current_caller
from chassis.process import Process
from chassis.rpc.server import ServerBuilder
from finemesh.artifacts.v1 import (
    artifact_pb2,
    file_artifact_service_pb2,
    file_artifact_service_pb2_grpc,
    model_artifact_service_pb2,
    model_artifact_service_pb2_grpc,
)
from finemesh.billing.v1 import billing_service_pb2
from finemesh.datasets.v1 import dataset_service_pb2, dataset_service_pb2_grpc
from finemesh.files.v1 import dataset_preview_pb2
from finemesh.holds.v1 import hold_service_pb2, hold_service_pb2_grpc
from tests.harness.fixtures import SettingsFactory

BASE = "finemesh/demo-llama"
NANOS_PER_TOKEN = 1000


@dataclass(kw_only=True)
class Script:
    """What the peers know and how they fail; a test changes it as it goes."""

    files: dict[str, str] = field(default_factory=dict)
    token_count: int = 1000
    # 0: counted by an earlier version, which does not say it.
    row_count: int = 0
    packed_sequence_count: int = 0
    analysis_error: DomainError | None = None
    analyses: int = 0
    # Files whose analysis never ends by itself, by digest, and for whom a trainer works now.
    hanging: set[str] = field(default_factory=set)
    at_work: list[tuple[str, str]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    preparation_version: str = ""
    previews: list[dataset_service_pb2.PreviewDatasetRequest] = field(default_factory=list)
    descriptions: list[str] = field(default_factory=list)
    # A trainer that takes the question and never answers.
    is_silent: bool = False
    hold_error: DomainError | None = None
    holds: dict[str, str] = field(default_factory=dict)
    released: list[str] = field(default_factory=list)
    price_payers: list[str] = field(default_factory=list)
    # Key of the job by its name; jobs whose hold is over; how often somebody asked to renew holds.
    hold_keys: dict[str, str] = field(default_factory=dict)
    ended_holds: set[str] = field(default_factory=set)
    renewed: list[str] = field(default_factory=list)
    renewal_error: DomainError | None = None
    renewals_refused: int = 0
    base_revision: str = "rv_base"
    # What calls reach by these names.
    taken_names: dict[str, "model_artifact_service_pb2.ModelNameUse.ValueType"] = field(default_factory=dict)
    knows_names: bool = True
    context_tokens_max: int = 2048
    parameter_count: int = 1_000_000
    _asked: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self) -> None:
        """Wakes whoever waits for what a peer was asked."""
        self._asked.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns once a question about holds, or an analysis that begins or ends, has made it true."""
        async with asyncio.timeout(60):
            while not condition():
                self._asked.clear()
                await self._asked.wait()


class Files(file_artifact_service_pb2_grpc.FileArtifactServiceServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    async def ResolveFile(
        self, request: file_artifact_service_pb2.ResolveFileRequest, context: object
    ) -> file_artifact_service_pb2.ResolveFileResponse:
        sha256 = self.script.files.get(request.name)
        if sha256 is None or f"projects/{current_caller().tenant}/" not in request.name:
            raise NotFound("NOT_FOUND", f"there is no file {request.name}")
        size_bytes = self.script.sizes.get(request.name, 10)
        file = artifact_pb2.ArtifactFile(path="", size_bytes=size_bytes, sha256=sha256)
        return file_artifact_service_pb2.ResolveFileResponse(
            artifact=artifact_pb2.Artifact(key=f"files/{request.name}", files=[file]),
            format="conversation",
            line_count=3,
        )


class Models(model_artifact_service_pb2_grpc.ModelArtifactServiceServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    async def ResolveBaseModel(
        self, request: model_artifact_service_pb2.ResolveBaseModelRequest, context: object
    ) -> model_artifact_service_pb2.ResolveBaseModelResponse:
        if request.model_id != BASE:
            raise NotFound("MODEL_UNKNOWN", f"there is no base model {request.model_id}")
        return model_artifact_service_pb2.ResolveBaseModelResponse(
            artifact=artifact_pb2.Artifact(key="base/demo/rv_base/"),
            revision=self.script.base_revision,
            parameter_count=self.script.parameter_count,
            context_tokens_max=self.script.context_tokens_max,
            adapter_rank_max=64,
        )

    async def LookUpModelName(
        self, request: model_artifact_service_pb2.LookUpModelNameRequest, context: object
    ) -> model_artifact_service_pb2.LookUpModelNameResponse:
        if not self.script.knows_names:
            raise Unimplemented("NOT_OFFERED", "an older inference")
        use = self.script.taken_names.get(request.model_id, model_artifact_service_pb2.MODEL_NAME_USE_UNSPECIFIED)
        return model_artifact_service_pb2.LookUpModelNameResponse(use=use)


class Datasets(dataset_service_pb2_grpc.DatasetServiceServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    async def AnalyzeDataset(
        self, request: dataset_service_pb2.AnalyzeDatasetRequest, context: object
    ) -> dataset_service_pb2.AnalyzeDatasetResponse:
        self.script.analyses += 1
        await self._work(request.dataset)
        if self.script.analysis_error is not None:
            raise self.script.analysis_error
        return dataset_service_pb2.AnalyzeDatasetResponse(
            example_count=3,
            token_count=self.script.token_count,
            labelled_token_count=500,
            plan_sha256="plan",
            preparation_version=self.script.preparation_version,
            rows_per_second=12.5,
            row_count=self.script.row_count,
            packed_sequence_count=self.script.packed_sequence_count,
        )

    async def PreviewDataset(
        self, request: dataset_service_pb2.PreviewDatasetRequest, context: object
    ) -> dataset_service_pb2.PreviewDatasetResponse:
        self.script.previews.append(request)
        await self._work(request.dataset)
        if self.script.analysis_error is not None:
            raise self.script.analysis_error
        preview = dataset_preview_pb2.DatasetPreview(row_count=3, train_on_inputs=request.train_on_inputs)
        return dataset_service_pb2.PreviewDatasetResponse(preview=preview)

    async def _work(self, dataset: artifact_pb2.Artifact) -> None:
        """Until the caller is gone, for a file that hangs."""
        if dataset.files[0].sha256 not in self.script.hanging:
            return
        caller = current_caller()
        entry = (caller.account, caller.subject)
        self.script.at_work.append(entry)
        self.script.note()
        try:
            await asyncio.Event().wait()
        finally:
            self.script.at_work.remove(entry)
            self.script.note()

    async def DescribeModel(
        self, request: dataset_service_pb2.DescribeModelRequest, context: object
    ) -> dataset_service_pb2.DescribeModelResponse:
        self.script.descriptions.append(request.base_model.key)
        if self.script.is_silent:
            await asyncio.Event().wait()
        if self.script.analysis_error is not None:
            raise self.script.analysis_error
        return dataset_service_pb2.DescribeModelResponse(supports_tools=True)


class Holds(hold_service_pb2_grpc.HoldServiceServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    async def QuoteWork(
        self, request: hold_service_pb2.QuoteWorkRequest, context: object
    ) -> hold_service_pb2.QuoteWorkResponse:
        self.script.price_payers.append(request.organization_id)
        return hold_service_pb2.QuoteWorkResponse(quote=_price(request.price), available_nanos_usd=77)

    async def CreateHold(
        self, request: hold_service_pb2.CreateHoldRequest, context: object
    ) -> hold_service_pb2.CreateHoldResponse:
        if self.script.hold_error is not None:
            raise self.script.hold_error
        self.script.hold_keys[request.resource] = request.api_key_id
        hold_id = self.script.holds.setdefault(request.resource, f"hold_{len(self.script.holds)}")
        return hold_service_pb2.CreateHoldResponse(hold_id=hold_id, quote=_price(request.price))

    async def ReleaseHold(
        self, request: hold_service_pb2.ReleaseHoldRequest, context: object
    ) -> hold_service_pb2.ReleaseHoldResponse:
        self.script.released.append(request.resource)
        self.script.note()
        return hold_service_pb2.ReleaseHoldResponse()

    async def RenewHolds(
        self, request: hold_service_pb2.RenewHoldsRequest, context: object
    ) -> hold_service_pb2.RenewHoldsResponse:
        if self.script.renewal_error is not None:
            self.script.renewals_refused += 1
            self.script.note()
            raise self.script.renewal_error
        self.script.renewed += request.resources
        ended = [resource for resource in request.resources if resource in self.script.ended_holds]
        return hold_service_pb2.RenewHoldsResponse(ended_resources=ended)

    async def ListOverdueHolds(
        self, request: hold_service_pb2.ListOverdueHoldsRequest, context: object
    ) -> hold_service_pb2.ListOverdueHoldsResponse:
        return hold_service_pb2.ListOverdueHoldsResponse()


def _price(request: billing_service_pb2.EstimatePriceRequest) -> billing_service_pb2.EstimatePriceResponse:
    tokens = request.training_tokens * request.epochs + request.validation_tokens * request.epochs * request.evaluations
    return billing_service_pb2.EstimatePriceResponse(
        total_nanos_usd=tokens * NANOS_PER_TOKEN,
        price_book_version="test-1",
        terms=[
            billing_service_pb2.PriceTerm(
                description="tokens", quantity=tokens, nanos_usd_per_million=10**9, amount_nanos_usd=tokens * 1000
            )
        ],
    )


@dataclass(frozen=True, kw_only=True)
class Ports:
    gateway: int
    billing: int
    inference: int
    trainer: int


async def serve_peers(process: Process, make_settings: SettingsFactory, script: Script) -> Ports:
    """One server per peer, each with the certificate of the service that it stands for."""

    def builder(name: str) -> ServerBuilder:
        return ServerBuilder(process, make_settings(name), trusted_forwarders={"scheduler"})

    gateway, billing, inference, trainer = (builder(name) for name in ("gateway", "billing", "inference", "trainer"))
    allow = {"scheduler"}
    gateway.add(
        file_artifact_service_pb2_grpc.add_FileArtifactServiceServicer_to_server,
        Files(script),
        "finemesh.artifacts.v1.FileArtifactService",
        allow,
    )
    inference.add(
        model_artifact_service_pb2_grpc.add_ModelArtifactServiceServicer_to_server,
        Models(script),
        "finemesh.artifacts.v1.ModelArtifactService",
        allow,
    )
    trainer.add(
        dataset_service_pb2_grpc.add_DatasetServiceServicer_to_server,
        Datasets(script),
        "finemesh.datasets.v1.DatasetService",
        allow,
    )
    billing.add(
        hold_service_pb2_grpc.add_HoldServiceServicer_to_server, Holds(script), "finemesh.holds.v1.HoldService", allow
    )
    return Ports(
        gateway=await gateway.start(),
        billing=await billing.start(),
        inference=await inference.start(),
        trainer=await trainer.start(),
    )


AWAY = Unavailable("DEPENDENCY_UNAVAILABLE", "away for a test")
