"""The mesh that storms rage over: real processes, two of each service, three nodes, and a link between any two.

Leases, claims and pauses are short, so that what a fault began is over within seconds. Training is fake and engines are
stubs: a storm costs seconds, and what it breaks is everything around them.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg

from deploy.local.stack import Stack, StackOptions
from deploy.local.table import NATS, POSTGRES, SERVICES
from finemesh_client import Client
from finemesh_client.config import ClientConfig, local_stack
from tests.harness.links import Address, Link
from tests.harness.mesh import BASE, NO_QUARANTINE, NO_WARM_CHILDREN, make_base
from tests.storm import database_clock
from tests.storm.witness import FOLDER

NODES = 3
REPLICAS = {"gateway": 2, "scheduler": 2, "billing": 2, "inference": 2}
ENDPOINT_MINUTE_S = 1.0
TOKEN_S = 0.04
AGENTS_DOOR = "scheduler.AGENTS"
# Whom a process calls: a service, one of its doors, or a server.
CALLS = {
    "gateway": ("scheduler", "billing", "inference", POSTGRES),
    "scheduler": ("gateway", "billing", "inference", POSTGRES, NATS),
    "billing": (POSTGRES, NATS),
    "inference": ("billing", AGENTS_DOOR, POSTGRES, NATS),
    "trainer": (AGENTS_DOOR,),
}
CLIENT = "client"
DATABASES = tuple(name for name, peers in CALLS.items() if POSTGRES in peers)
SHORT = {
    **NO_QUARANTINE,
    **NO_WARM_CHILDREN,
    "PYTHONFAULTHANDLER": "1",
    "FINEMESH_SCHEDULER_LEASE_DURATION_S": "3",
    "FINEMESH_SCHEDULER_HEARTBEAT_INTERVAL_S": "0.3",
    "FINEMESH_SCHEDULER_SWEEP_INTERVAL_S": "0.3",
    "FINEMESH_SCHEDULER_CLAIM_DURATION_S": "3",
    "FINEMESH_SCHEDULER_PIPELINE_POLL_S": "0.3",
    "FINEMESH_SCHEDULER_WATCH_POLL_S": "0.5",
    "FINEMESH_SCHEDULER_PEER_DEADLINE_S": "2",
    "FINEMESH_SCHEDULER_ANALYSIS_DEADLINE_S": "5",
    "FINEMESH_SCHEDULER_TRANSACTION_IDLE_S_MAX": "1",
    "FINEMESH_SCHEDULER_ATTEMPTS_MAX": "100",
    "FINEMESH_TRAINER_CHILD_MODULE": "tests.storm.storm_child",
    "FINEMESH_TRAINER_ANALYSIS_MODULE": "tests.storm.storm_analysis",
    "FINEMESH_TRAINER_REPORT_INTERVAL_S": "0.1",
    "FINEMESH_TRAINER_REPORT_TIMEOUT_S": "2",
    "FINEMESH_TRAINER_REPORT_BACKOFF_S_MAX": "0.5",
    "FINEMESH_TRAINER_SCHEDULER_SILENCE_S_MIN": "0.5",
    "FINEMESH_TRAINER_CANCEL_GRACE_S": "5",
    "FINEMESH_INFERENCE_STUB_TOKEN_S": str(TOKEN_S),
    "FINEMESH_INFERENCE_ENDPOINT_POLL_S": "0.2",
    "FINEMESH_INFERENCE_ENDPOINT_MINUTE_S": str(ENDPOINT_MINUTE_S),
    "FINEMESH_INFERENCE_ENDPOINT_SILENCE_S_MAX": "3",
    "FINEMESH_INFERENCE_SPENDING_POLL_S": "0.5",
    "FINEMESH_INFERENCE_CLAIM_DURATION_S": "3",
    "FINEMESH_INFERENCE_CREDIT_RENEWAL_S": "0.5",
    "FINEMESH_INFERENCE_CREDIT_IDLE_S": "2",
    "FINEMESH_INFERENCE_CREDIT_WAIT_S_MAX": "4",
    "FINEMESH_BILLING_CREDIT_LEASE_S": "6",
    "FINEMESH_BILLING_CREDIT_LATE_USAGE_S": "3",
    "FINEMESH_BILLING_CREDIT_COLLECT_INTERVAL_S": "0.5",
    "FINEMESH_INFERENCE_METERING_INTERVAL_S": "0.5",
    "FINEMESH_GATEWAY_SWEEP_INTERVAL_S": "0.5",
    "FINEMESH_GATEWAY_SWEEP_CLAIM_S": "2",
    "FINEMESH_GATEWAY_UPLOAD_S_MAX": "6",
    "FINEMESH_GATEWAY_UPLOAD_IDLE_S_MAX": "3",
    "FINEMESH_GATEWAY_DELETED_FILE_RETENTION_S": "0",
    # Of files, archived events and what attempts leave behind; longer than a node may be frozen.
    "FINEMESH_SCHEDULER_RUN_STATE_RETENTION_S": "6",
    "FINEMESH_TRAINER_FOLDER_INTERVAL_S": "0.5",
    "FINEMESH_SCHEDULER_FOLDER_CLAIM_S": "3",
    "FINEMESH_BILLING_ARCHIVE_INTERVAL_S": "0.5",
    "FINEMESH_BILLING_ARCHIVE_WRITE_S_MAX": "3",
    "FINEMESH_BILLING_ARCHIVE_KEEP_INTERVAL_S": "0.5",
    "FINEMESH_BILLING_ARCHIVE_BACKOFF_S_MAX": "0.5",
    "FINEMESH_CONSUMER_ACK_WAIT_S": "2",
    "FINEMESH_CONSUMER_BACKOFF_S_MIN": "0.05",
    "FINEMESH_CONSUMER_BACKOFF_S_MAX": "0.5",
    "FINEMESH_CONSUMER_FETCH_WAIT_S": "1",
    "FINEMESH_OUTBOX_LEASE_S": "2",
    "FINEMESH_OUTBOX_POLL_S": "0.3",
    "FINEMESH_PUBLISH_TIMEOUT_S": "2",
    "FINEMESH_KEEPALIVE_S": "2",
    "FINEMESH_POOL_WAIT_S_MAX": "2",
    "FINEMESH_CONNECT_TIMEOUT_S": "2",
    "FINEMESH_STATEMENT_TIMEOUT_S": "5",
    "FINEMESH_TRANSACTION_IDLE_S_MAX": "2",
    "FINEMESH_DEFAULT_DEADLINE_S": "8",
    "FINEMESH_DRAIN_GRACE_S": "3",
}


@dataclass(kw_only=True)
class StormMesh:
    """A running stack whose processes meet through `links`, by `<process>><peer>`."""

    folder: Path
    stack: Stack
    links: dict[str, Link] = field(default_factory=dict)
    # Whom a storm killed, by process; a second kill of one that is on its way out is none.
    killed: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))

    @property
    def witness(self) -> Path:
        return self.stack.folder.root / FOLDER

    def clock(self, process: str) -> Path:
        return self.stack.folder.root / f"clock-{process}"

    def deaths(self) -> dict[str, int]:
        """How often each process ended although nobody killed it."""
        return {name: self.stack.restarts(name) - len(self.killed[name]) for name in process_names()}

    def client(self, api_key: str) -> Client:
        """Of the two gateways, through a link."""
        config = ClientConfig(address=self.links[CLIENT].address, api_key=api_key, timeout_s=5.0, attempts=1)
        return Client(config)

    async def rows(self, service: str, statement: str, *values: object) -> list[asyncpg.Record]:
        """What a statement finds in the tables of one service; not through a link."""
        connection = await asyncpg.connect(self.database_url(service))
        try:
            return list(await connection.fetch(statement, *values))
        finally:
            await connection.close()

    def database_url(self, service: str) -> str:
        return self.stack.environment(service)[f"FINEMESH_{service.upper()}_DATABASE_URL"]

    def targets(self, peer: str, *, every: bool) -> list[Address]:
        """Where a peer listens: the public doors for a client, and the process of that name or `every` replica."""
        addresses, peer = self.stack.addresses, "gateway.PUBLIC" if peer == CLIENT else peer
        names = doors_of(peer) if every else [peer]
        return [(host, int(port)) for host, _, port in (addresses[name].partition(":") for name in names)]


def replicas_of(service: str) -> list[str]:
    count = REPLICAS.get(service, 1)
    return [service, *(f"{service}-{number}" for number in range(1, count))]


def doors_of(peer: str) -> list[str]:
    """The same door of every replica: `scheduler.AGENTS` and `scheduler-1.AGENTS`."""
    service, dot, door = peer.partition(".")
    return [f"{name}{dot}{door}" for name in replicas_of(service)]


def services_processes() -> list[str]:
    """Of all services, as the stack names them."""
    names = [name for service in SERVICES if not service.per_node for name in replicas_of(service.name)]
    return [*names, *(f"trainer-{node}" for node in range(NODES))]


def link_names() -> list[str]:
    """Every link, in a fixed order."""
    names = [CLIENT]
    for process in services_processes():
        for peer in CALLS[process.partition("-")[0]]:
            # An agent chooses among the replicas by itself, so it has a link to each.
            peers = doors_of(peer) if process.startswith("trainer") else [peer]
            names += [f"{process}>{one}" for one in peers]
    return names


def process_names() -> list[str]:
    return [POSTGRES, NATS, *services_processes()]


def clock_names() -> list[str]:
    """Those that can be set; the bus has one of its own, which nobody can reach."""
    return [POSTGRES, *services_processes()]


def rewired(mesh: StormMesh, process: str, environment: Mapping[str, str]) -> dict[str, str]:
    """What a process is told instead: its peers behind links, its clock, and the module that it is."""
    service = next(one for one in SERVICES if one.name == process.partition("-")[0])
    told = {"STORM_MODULE": service.module, "STORM_CLOCK": str(mesh.clock(process))}
    for name, link in mesh.links.items():
        caller, _, peer = name.partition(">")
        if caller != process:
            continue
        if peer == POSTGRES:
            variable = f"{service.env_prefix}DATABASE_URL"
            told[variable] = _moved(environment[variable], link.address)
        elif peer == NATS:
            told["FINEMESH_NATS_URL"] = _moved(environment["FINEMESH_NATS_URL"], link.address)
        else:
            callee, _, door = peer.partition(".")
            variable = "_".join(filter(None, ["FINEMESH", callee.partition("-")[0].upper(), door, "ADDRESS"]))
            told[variable] = ",".join(filter(None, [told.get(variable, ""), link.address]))
    return told


def _moved(url: str, address: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=f"{parts.netloc.rpartition('@')[0]}@{address}").geturl()


@asynccontextmanager
async def storm_mesh(folder: Path) -> AsyncIterator[StormMesh]:
    """Everything up and a base model imported; all gone after."""
    base = await asyncio.to_thread(make_base, folder)
    mesh: StormMesh
    notices = (folder / "launcher.log").open("w", encoding="utf-8")
    options = StackOptions(
        data=folder / "data",
        engine="stub",
        nodes=NODES,
        replicas=REPLICAS,
        services=tuple(replace(service, module="tests.storm.storm_process") for service in SERVICES),
        environment=SHORT,
        notices=notices,
        rewire=lambda name, environment: rewired(mesh, name, environment),
    )
    mesh = StormMesh(folder=folder, stack=Stack(options))
    mesh.witness.mkdir(parents=True)
    for process in services_processes():
        mesh.clock(process).write_text("0")
    for name in link_names():
        process, _, peer = name.partition(">")
        link = mesh.links[name] = Link(_targets(mesh, process, peer or CLIENT))
        await link.start()
    try:
        async with mesh.stack:
            await database_clock.install(mesh)
            key = local_stack(mesh.stack.folder.root)["api_key"]
            async with mesh.client(key) as client:
                await client.models.import_base(BASE, base)
            yield mesh
    finally:
        for link in mesh.links.values():
            await link.close()
        notices.close()


def _targets(mesh: StormMesh, process: str, peer: str) -> Callable[[], list[Address]]:
    """An agent has a link to each scheduler; every other link leads to all replicas of a service."""
    return lambda: mesh.targets(peer, every=not process.startswith("trainer"))
