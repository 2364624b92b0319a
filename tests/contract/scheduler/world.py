"""The real scheduler on loopback mTLS, its scripted peers, and a gateway that speaks for users."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chassis.identity import Caller, acting_as
from chassis.process import Process
from chassis.rpc.channel import open_channel
from chassis.settings import ChassisSettings
from finemesh.allocations.v1 import allocation_service_pb2_grpc
from finemesh.tuning.v1 import tuning_job_pb2, tuning_service_pb2, tuning_service_pb2_grpc
from services.scheduler.config import SchedulerSettings
from services.scheduler.main import main
from tests.contract.scheduler.agent import NODE, WAIT_S_MAX, Agent
from tests.contract.scheduler.peers import BASE, Ports, Script, serve_peers
from tests.harness.fixtures import SettingsFactory, node_tls_dir
from tests.harness.living import living

OWNER = Caller(
    service="gateway", tenant="proj_a", account="org_a", subject="key_a", roles=frozenset({"member"}), namespace="team"
)
STRANGER = Caller(service="gateway", tenant="proj_b", account="org_b", subject="key_b", namespace="others")
FILE = "projects/proj_a/files/file_train"


def state_name(job: tuning_job_pb2.TuningJob) -> str:
    return tuning_job_pb2.TuningJobState.Name(job.state).removeprefix("TUNING_JOB_STATE_")


@dataclass(kw_only=True)
class World:
    script: Script
    ports: Ports
    settings: SchedulerSettings
    make_settings: SettingsFactory
    target: str
    # Of the server for agents.
    agents_target: str
    tuning: Any
    allocations: Any
    numbers: list[int] = field(default_factory=list)

    def agent(self, **values: Any) -> Agent:
        return Agent(
            self.node_settings(values.get("node", NODE)),
            self.agents_target,
            f"127.0.0.1:{self.ports.trainer}",
            **values,
        )

    @asynccontextmanager
    async def second_replica(self, folder: Path) -> AsyncIterator[Any]:
        """Another scheduler on the same database and bus, for users; yields its tuning service."""
        port_file = folder / "second"
        files = {"port_file": port_file, "agents_port_file": folder / "second_agents"}
        settings = self.settings.model_copy(update=files)
        async with living(settings, lambda process: main(process, settings)):
            target = f"127.0.0.1:{port_file.read_text().strip()}"
            channel = open_channel(self.make_settings("gateway"), target, "scheduler")
            try:
                yield tuning_service_pb2_grpc.TuningServiceStub(channel)
            finally:
                await channel.close()

    def node_settings(self, node: str) -> ChassisSettings:
        """Of an agent with the certificate of this node."""
        return self.make_settings("trainer", tls_dir=node_tls_dir(self.settings.tls_dir, node))

    def spec(self, **values: Any) -> tuning_job_pb2.TuningSpec:
        """The least request; the file is one that was never analysed before."""
        if "training_file" not in values:
            self.numbers.append(len(self.numbers))
            values["training_file"] = f"{FILE}-{len(self.numbers)}"
            self.script.files[values["training_file"]] = f"sha-{len(self.numbers)}-{id(self)}"
        return tuning_job_pb2.TuningSpec(**{"base_model": BASE, **values})

    async def create(self, spec: tuning_job_pb2.TuningSpec | None = None, request_id: str = "") -> str:
        request = tuning_service_pb2.CreateTuningJobRequest(spec=spec or self.spec(), request_id=request_id)
        with acting_as(OWNER):
            response = await self.tuning.CreateTuningJob(request)
        name: str = response.tuning_job.name
        return name

    async def get(self, name: str, caller: Caller = OWNER) -> tuning_job_pb2.TuningJob:
        with acting_as(caller):
            response = await self.tuning.GetTuningJob(tuning_service_pb2.GetTuningJobRequest(name=name))
        job: tuning_job_pb2.TuningJob = response.tuning_job
        return job

    async def cancel(self, name: str, caller: Caller = OWNER) -> tuning_job_pb2.TuningJob:
        with acting_as(caller):
            response = await self.tuning.CancelTuningJob(tuning_service_pb2.CancelTuningJobRequest(name=name))
        job: tuning_job_pb2.TuningJob = response.tuning_job
        return job

    async def until(self, name: str, *states: str) -> tuning_job_pb2.TuningJob:
        """The job once it is in one of these states, told by a watch."""
        return await self.when(name, lambda job: state_name(job) in states)

    async def when(
        self, name: str, wanted: Callable[[tuning_job_pb2.TuningJob], bool], caller: Caller = OWNER
    ) -> tuning_job_pb2.TuningJob:
        request = tuning_service_pb2.WatchTuningJobRequest(name=name)
        last = None
        with acting_as(caller):
            stream = self.tuning.WatchTuningJob(request)
        try:
            async with asyncio.timeout(WAIT_S_MAX):
                async for response in stream:
                    last = response.tuning_job
                    if wanted(last):
                        return last
        except TimeoutError:
            raise AssertionError(f"the job did not get there; it is {last}") from None
        raise AssertionError(f"the job ended otherwise: {last}")


@asynccontextmanager
async def running_world(make_settings: SettingsFactory, port_file: Path, **overrides: Any) -> AsyncIterator[World]:
    script = Script()
    found: list[Ports] = []

    async def wire_peers(process: Process) -> None:
        found.append(await serve_peers(process, make_settings, script))

    async with living(make_settings("gateway", drain_grace_s=1.0), wire_peers):
        ports = found[0]
        base = make_settings("scheduler")
        given: dict[str, Any] = {
            "database_url": base.database_url,
            "nats_url": base.nats_url,
            "tls_dir": base.tls_dir,
            "port_file": port_file,
            "agents_port_file": port_file.with_name("agents"),
            "gateway_address": f"127.0.0.1:{ports.gateway}",
            "billing_address": f"127.0.0.1:{ports.billing}",
            "inference_address": f"127.0.0.1:{ports.inference}",
            "lease_duration_s": 3.0,
            "heartbeat_interval_s": 0.2,
            "sweep_interval_s": 0.1,
            "pipeline_poll_s": 0.2,
            "watch_poll_s": 0.5,
            "queue_snapshot_s": 0.05,
            "claim_duration_s": 1.0,
            "description_retry_s": 0.0,
            "hold_renewal_interval_s": 0.2,
            "drain_grace_s": 2.0,
        }
        settings = SchedulerSettings(**(given | overrides))
        async with living(settings, lambda process: main(process, settings)):
            target = f"127.0.0.1:{port_file.read_text().strip()}"
            gateway = open_channel(make_settings("gateway"), target, "scheduler")
            agents_target = f"127.0.0.1:{port_file.with_name('agents').read_text().strip()}"
            inference = open_channel(make_settings("inference"), agents_target, "scheduler")
            try:
                yield World(
                    script=script,
                    ports=ports,
                    settings=settings,
                    make_settings=make_settings,
                    target=target,
                    agents_target=agents_target,
                    tuning=tuning_service_pb2_grpc.TuningServiceStub(gateway),
                    allocations=allocation_service_pb2_grpc.AllocationServiceStub(inference),
                )
            finally:
                await gateway.close()
                await inference.close()
