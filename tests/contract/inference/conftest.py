"""The real inference service on real servers, with the stub engine and a scripted scheduler."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import numpy as np
import pytest
import pytest_asyncio
from google.protobuf.message import Message
from safetensors.numpy import save_file

from chassis.bus.connection import connect
from chassis.bus.subjects import stream_of, subject_of
from chassis.errors import Aborted, NotFound
from chassis.identity import Caller, acting_as
from chassis.process import Process
from chassis.rpc.channel import open_channel
from chassis.rpc.server import ServerBuilder
from chassis.settings import ChassisSettings
from finemesh.allocations.v1 import allocation_service_pb2 as allocations
from finemesh.allocations.v1 import allocation_service_pb2_grpc
from finemesh.artifacts.v1 import artifact_pb2
from finemesh.events.v1 import tuning_events_pb2
from finemesh.models.v1 import model_service_pb2 as models
from finemesh.models.v1 import model_service_pb2_grpc
from services.inference.config import InferenceSettings
from services.inference.main import main
from tests.contract.inference.scripted_billing import ScriptedBilling, running_billing
from tests.harness.base_model import write_base
from tests.harness.fixtures import SettingsFactory
from tests.harness.living import living
from tests.harness.polling import eventually

BASE = "finemesh/tiny"
RANK = 4
OPERATOR = frozenset({"member", "admin", "operator"})


class ScriptedScheduler(allocation_service_pb2_grpc.AllocationServiceServicer):
    """Has one device, which it takes away when nobody renews it, and when a test says so."""

    def __init__(self, *, lease_s: float = 60.0) -> None:
        self.owner = ""
        self.token = 0
        self.busy = False
        # The node that the device is on.
        self.node = "local-0"
        self.renewed_s = 0.0
        self._lease_s = lease_s
        self._given = asyncio.Event()

    async def gives(self) -> None:
        """Returns once somebody has the device."""
        async with asyncio.timeout(60):
            while not self.owner:
                self._given.clear()
                await self._given.wait()

    async def CreateAllocation(
        self, request: allocations.CreateAllocationRequest, context: object
    ) -> allocations.CreateAllocationResponse:
        self._expire()
        if request.node not in ("", self.node):
            raise NotFound("NOT_FOUND", f"node {request.node} is not registered")
        if self.busy or self.owner not in ("", request.owner):
            return allocations.CreateAllocationResponse(waiting_for="1 device of type cpu; 0 of 1 free")
        if not self.owner:
            self.owner, self.token, self.renewed_s = request.owner, self.token + 1, time.monotonic()
            self._given.set()
        return allocations.CreateAllocationResponse(allocation=self._allocation())

    async def RenewAllocation(
        self, request: allocations.RenewAllocationRequest, context: object
    ) -> allocations.RenewAllocationResponse:
        self._expire()
        if (request.owner, request.lease_token) != (self.owner, self.token):
            raise Aborted("LEASE_STALE", "the allocation is another's now")
        self.renewed_s = time.monotonic()
        return allocations.RenewAllocationResponse(allocation=self._allocation())

    async def ReleaseAllocation(
        self, request: allocations.ReleaseAllocationRequest, context: object
    ) -> allocations.ReleaseAllocationResponse:
        if (request.owner, request.lease_token) == (self.owner, self.token):
            self.owner = ""
        return allocations.ReleaseAllocationResponse()

    def _expire(self) -> None:
        if self.owner and time.monotonic() - self.renewed_s > self._lease_s:
            self.owner = ""

    def _allocation(self) -> allocations.Allocation:
        given = allocations.Allocation(lease_token=self.token, node=self.node, device_indices=[0], hardware_type="cpu")
        given.lease_duration.FromMilliseconds(int(self._lease_s * 1000))
        return given


@dataclass(frozen=True, kw_only=True)
class World:
    """The running service as its callers see it."""

    channel: grpc.aio.Channel
    settings: InferenceSettings
    scheduler: ScriptedScheduler
    billing: ScriptedBilling
    process: Process

    @contextmanager
    def caller(
        self, project: str = "proj_a", roles: frozenset[str] = OPERATOR, namespace: str = "demo"
    ) -> Iterator[None]:
        """Calls inside the block come from this project's key, forwarded by the gateway."""
        caller = Caller(
            service="gateway",
            tenant=project,
            account=f"org_of_{project}",
            subject="key_1",
            roles=roles,
            namespace=namespace,
        )
        with acting_as(caller):
            yield


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a base model; the stub engine needs no more."""
    folder = tmp_path_factory.mktemp("base")
    write_base(folder)
    return folder


async def import_parts(
    folder: Path,
    model_id: str = BASE,
    source: str = "",
    *,
    tool_parser: str = "",
    reasoning_parser: str = "",
    chat_template: str = "",
    **broken: str,
) -> AsyncIterator[models.ImportBaseModelRequest]:
    """The messages of an import; `broken` maps a file name to a wrong digest."""
    header = models.ImportBaseModelHeader(
        model_id=model_id,
        source=source,
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
        chat_template=chat_template,
    )
    yield models.ImportBaseModelRequest(header=header)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        digest = broken.get(path.stem, hashlib.sha256(content).hexdigest())
        yield models.ImportBaseModelRequest(
            file=models.ImportBaseModelFile(path=path.name, size_bytes=len(content), sha256=digest)
        )
        yield models.ImportBaseModelRequest(chunk=content)


@asynccontextmanager
async def running_world(
    make_settings: SettingsFactory, base_folder: Path, root: Path, **overrides: Any
) -> AsyncIterator[World]:
    """Inference with one imported base model, with these settings. Billing leases what it is asked for, the scheduler a
    device for `lease_s`."""
    scheduler, billing = ScriptedScheduler(lease_s=overrides.pop("lease_s", 60.0)), ScriptedBilling()
    shared = make_settings()
    given: dict[str, Any] = {
        "database_url": shared.database_url,
        "nats_url": shared.nats_url,
        "tls_dir": shared.tls_dir,
    }
    as_scheduler = ChassisSettings(service_name="scheduler", port_file=root / "scheduler.port", **given)

    async def wire_scheduler(process: Process) -> None:
        server = ServerBuilder(process, as_scheduler)
        server.add(
            allocation_service_pb2_grpc.add_AllocationServiceServicer_to_server,
            scheduler,
            "finemesh.allocations.v1.AllocationService",
            {"inference"},
        )
        await server.start()

    async with living(as_scheduler, wire_scheduler), running_billing(billing, root, shared.tls_dir) as address:
        overrides = {"billing_address": address, **overrides}
        settings = InferenceSettings(
            port_file=root / "inference.port",
            scheduler_agents_address=f"127.0.0.1:{(root / 'scheduler.port').read_text()}",
            artifacts_url=(root / "artifacts").as_uri(),
            data_dir=root / "data",
            engine="stub",
            endpoint_poll_s=0.02,
            endpoint_minute_s=0.2,
            outbox_poll_s=0.05,
            **given,
            **overrides,
        )
        async with living(settings, lambda process: main(process, settings)) as process:
            gateway = ChassisSettings(service_name="gateway", **given)
            channel = open_channel(gateway, f"127.0.0.1:{(root / 'inference.port').read_text()}", "inference")
            made = World(channel=channel, settings=settings, scheduler=scheduler, billing=billing, process=process)
            with made.caller():
                stub = model_service_pb2_grpc.ModelServiceStub(channel)
                await stub.ImportBaseModel(import_parts(base_folder))
            yield made
            await channel.close()


@asynccontextmanager
async def running_beside(world: World, root: Path, **overrides: Any) -> AsyncIterator[World]:
    """Another process of inference on the same database, with the settings of the first but for these."""
    settings = world.settings.model_copy(update={"port_file": root / "beside.port", **overrides})
    async with living(settings, lambda process: main(process, settings)) as process:
        channel = open_channel(
            settings.model_copy(update={"service_name": "gateway"}),
            f"127.0.0.1:{(root / 'beside.port').read_text().strip()}",
            "inference",
        )
        yield replace(world, channel=channel, settings=settings, process=process)
        await channel.close()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(
    make_settings: SettingsFactory, base_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    """Inference as most tests want it."""
    async with running_world(make_settings, base_folder, tmp_path_factory.mktemp("inference")) as made:
        yield made


async def publish(world: World, event: Message) -> uuid.UUID:
    """An event as another service emits it; returns the id that it got."""
    subject, event_id = subject_of(event), uuid.uuid4()
    bus = await connect(world.settings)
    await bus.ensure_stream(stream_of(subject))
    headers = {
        "ce-specversion": "1.0",
        "ce-id": str(event_id),
        "ce-source": "test",
        "ce-type": event.DESCRIPTOR.full_name,
        "ce-subject": "test",
        "ce-time": datetime.now(UTC).isoformat(),
    }
    await bus.jetstream.publish(subject, event.SerializeToString(), headers=headers)
    await bus.close()
    return event_id


async def handled(world: World, event_id: uuid.UUID) -> None:
    """Returns once the service has handled the event, which only its inbox says."""
    connection = await asyncpg.connect(world.settings.database_url)
    try:
        await eventually(lambda: connection.fetchval("SELECT true FROM inbox WHERE event_id = $1", event_id))
    finally:
        await connection.close()


async def ended_job(world: World, model_id: str, job: str) -> tuning_events_pb2.TuningJobEnded:
    """What the scheduler says of a job of proj_a that made this model; its adapter lies in the store."""
    artifacts = Path(world.settings.artifacts_url.removeprefix("file://")) / "models/proj_a/tuned"
    artifacts.mkdir(parents=True, exist_ok=True)
    described = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (artifacts / "adapter_config.json").write_text(json.dumps(described))
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    matrices = {
        f"{layer}.lora_A.weight": np.ones((RANK, 8), np.float32),
        f"{layer}.lora_B.weight": np.ones((8, RANK), np.float32),
    }
    save_file(matrices, artifacts / "adapter_model.safetensors")
    files = []
    for path in sorted(artifacts.iterdir()):
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        files.append(artifact_pb2.ArtifactFile(path=path.name, size_bytes=len(content), sha256=digest))
    stub = model_service_pb2_grpc.ModelServiceStub(world.channel)
    with world.caller():
        base = (await stub.GetBaseModel(models.GetBaseModelRequest(name=f"baseModels/{BASE}"))).base_model
    event = tuning_events_pb2.TuningJobEnded(
        tuning_job=f"projects/proj_a/tuningJobs/{job}",
        project_id="proj_a",
        organization_id="org_of_proj_a",
        ending=tuning_events_pb2.TUNING_JOB_ENDING_COMPLETED,
        model=tuning_events_pb2.TunedModel(
            model_id=model_id,
            revision="rv_tuned",
            kind="adapter",
            adapter_rank=RANK,
            base_model=BASE,
            base_revision=base.revision,
            artifact=artifact_pb2.Artifact(key="models/proj_a/tuned/", files=files),
        ),
    )
    event.end_time.GetCurrentTime()
    return event


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def tuned_model(world: World) -> str:
    """A tuned model of proj_a, registered by the event that the scheduler emits; sent twice, as the bus may do."""
    event = await ended_job(world, "demo/tuned", "ft-1")
    stub = model_service_pb2_grpc.ModelServiceStub(world.channel)
    for _ in range(2):
        await publish(world, event)

    async def registered() -> str:
        with world.caller():
            try:
                return (await stub.GetModel(models.GetModelRequest(name="demo/tuned"))).model.model_id
            except NotFound:
                return ""

    return await eventually(registered)
