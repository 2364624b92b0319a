"""The real billing service, wired by its own main, with clients that hold the certificates of its real callers."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.message import Message

from chassis.bus.outbox import Outbox
from chassis.clock import SystemClock
from chassis.db.pool import Pool, open_pool, transaction
from chassis.errors import NotFound
from chassis.identity import Caller, acting_as
from chassis.ids import SystemIds
from chassis.process import Process
from chassis.rpc.channel import open_channel
from chassis.rpc.server import ServerBuilder
from finemesh.billing.v1.billing_service_pb2 import EstimatePriceRequest, TopUpRequest
from finemesh.billing.v1.billing_service_pb2_grpc import BillingServiceStub
from finemesh.holds.v1.hold_service_pb2 import CreateHoldRequest, CreateHoldResponse
from finemesh.holds.v1.hold_service_pb2_grpc import HoldServiceStub
from finemesh.organizations.v1.organization_service_pb2 import FindOrganizationRequest, FindOrganizationResponse
from finemesh.organizations.v1.organization_service_pb2_grpc import (
    OrganizationServiceServicer,
    add_OrganizationServiceServicer_to_server,
)
from services.billing.config import BillingSettings
from services.billing.main import main
from tests.harness.books import write_books
from tests.harness.fixtures import SettingsFactory
from tests.harness.living import living
from tests.harness.polling import eventually
from tests.harness.servers import NatsServer

if TYPE_CHECKING:
    from finemesh.billing.v1.billing_service_pb2_grpc import BillingServiceAsyncStub
    from finemesh.holds.v1.hold_service_pb2_grpc import HoldServiceAsyncStub

WAIT_S_MAX = 60.0
SERVICES = ("gateway", "scheduler", "inference")
_numbers = count(1)


class Organizations(OrganizationServiceServicer):
    """The gateway's: knows those in `existing`."""

    def __init__(self) -> None:
        self.existing: set[str] = set()
        self.port = 0

    async def FindOrganization(self, request: FindOrganizationRequest, context: Any) -> FindOrganizationResponse:
        if request.name not in self.existing:
            raise NotFound("NOT_FOUND", f"there is no organization {request.name}")
        return FindOrganizationResponse()


@dataclass(kw_only=True)
class Mesh:
    """`billing` calls as the gateway does, `holds` as the scheduler; `publish` sends events as they would."""

    settings: BillingSettings
    billing: "BillingServiceAsyncStub"
    holds: "HoldServiceAsyncStub"
    misplaced: "HoldServiceAsyncStub"
    # By the service whose certificate they have.
    channels: dict[str, grpc.aio.Channel]
    pool: Pool
    outbox: Outbox
    organizations: Organizations
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def publish(self, message: Message, key: str | None = None) -> None:
        async with transaction(self.pool) as connection:
            await self.outbox.add(connection, message, subject_name="test", key=key or str(uuid.uuid4()))
        self.outbox.wake()

    async def until(self, query: str, expected: object, *arguments: object) -> None:
        look = partial(self.pool.fetchval, query, *arguments)
        await eventually(look, lambda answer: answer == expected, within_s=WAIT_S_MAX)


@dataclass(frozen=True, kw_only=True)
class Customer:
    """An organization with one project, and the identity that the gateway forwards for its key."""

    mesh: Mesh
    organization: str
    project: str

    def job(self, number: int = 1) -> str:
        return f"projects/{self.project}/tuningJobs/ft-{self.organization}-{number}"

    @contextmanager
    def calling(self, *roles: str) -> Iterator[None]:
        caller = Caller(
            service="gateway",
            tenant=self.project,
            account=self.organization,
            subject="key_1",
            roles=frozenset(roles),
        )
        with acting_as(caller):
            yield

    async def pay_in(self, amount_nanos_usd: int) -> None:
        with self.calling("operator"):
            await self.mesh.billing.TopUp(
                TopUpRequest(amount_nanos_usd=amount_nanos_usd, request_id=f"r{next(_numbers)}")
            )

    async def hold(self, number: int = 1, **price: Any) -> CreateHoldResponse:
        return await self.mesh.holds.CreateHold(
            CreateHoldRequest(
                resource=self.job(number),
                organization_id=self.organization,
                project_id=self.project,
                price=job_price(**price),
            )
        )


def job_price(**changes: Any) -> EstimatePriceRequest:
    numbers: dict[str, Any] = {
        "base_model": "finemesh/demo-llama",
        "training_tokens": 1000,
        "epochs": 2,
        "validation_tokens": 100,
        "evaluations": 1,
    }
    return EstimatePriceRequest(**{**numbers, **changes})


@pytest.fixture(scope="module")
def price_books_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The books that ship with billing; a module with prices of its own has its own fixture of this name."""
    return write_books(tmp_path_factory.mktemp("billing") / "books")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def organizations(make_settings: SettingsFactory) -> AsyncIterator[Organizations]:
    known = Organizations()

    async def wire(process: Process) -> None:
        server = ServerBuilder(process, process.settings)
        name = "finemesh.organizations.v1.OrganizationService"
        server.add(add_OrganizationServiceServicer_to_server, known, name, {"billing"})
        known.port = await server.start()

    async with living(make_settings("gateway"), wire):
        yield known


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def mesh(
    organizations: Organizations,
    database_url: str,
    nats_server: NatsServer,
    tls_dir: Path,
    make_settings: SettingsFactory,
    price_books_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Mesh]:
    settings = BillingSettings(
        gateway_address=f"127.0.0.1:{organizations.port}",
        price_books_dir=price_books_dir,
        database_url=database_url,
        nats_url=nats_server.url,
        tls_dir=tls_dir,
        port_file=tmp_path_factory.mktemp("billing") / "port",
        artifacts_url=tmp_path_factory.mktemp("artifacts").as_uri(),
        archive_interval_s=0.2,
        consumer_backoff_s_min=0.01,
        consumer_failures_max=3,
        hold_overdue_interval_s=0.1,
        # Some tests take hundreds of calls of one customer at once, which wait for each other on busy cores.
        pool_wait_s_max=30.0,
        outbox_poll_s=0.05,
        verify_batch_rows=1,
        verify_progress_s=0.0,
        journal_batch_rows=3,
        dead_letter_batch_rows=2,
    )
    assert settings.port_file is not None
    async with living(settings, lambda process: main(process, settings)):
        target = f"127.0.0.1:{settings.port_file.read_text().strip()}"
        channels = {name: open_channel(make_settings(name), target, "billing") for name in SERVICES}
        pool = await open_pool(settings)
        yield Mesh(
            settings=settings,
            billing=BillingServiceStub(channels["gateway"]),
            holds=HoldServiceStub(channels["scheduler"]),
            misplaced=HoldServiceStub(channels["gateway"]),
            channels=channels,
            pool=pool,
            outbox=Outbox(settings, clock=SystemClock(), ids=SystemIds()),
            organizations=organizations,
        )
        for channel in channels.values():
            await channel.close()
        await pool.close()


@pytest.fixture
def customer(mesh: Mesh) -> Customer:
    """An organization that no other test has."""
    number = next(_numbers)
    return Customer(mesh=mesh, organization=f"org_{number}", project=f"proj_{number}")


@pytest.fixture
def stranger(mesh: Mesh) -> Customer:
    number = next(_numbers)
    return Customer(mesh=mesh, organization=f"org_{number}", project=f"proj_{number}")
