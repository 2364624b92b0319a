"""Two replicas of inference and the real billing: calls at once never cost more than credit or a cap allows."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from chassis.errors import FailedPrecondition
from chassis.identity import Caller, acting_as
from chassis.rpc.channel import open_channel
from finemesh.billing.v1 import billing_service_pb2, budget_service_pb2
from finemesh.billing.v1.billing_service_pb2_grpc import BillingServiceStub
from finemesh.billing.v1.budget_service_pb2_grpc import BudgetServiceStub
from finemesh.inference.v1 import generation_pb2
from finemesh.inference.v1 import inference_service_pb2 as inference
from finemesh.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from services.billing.config import BillingSettings
from services.billing.main import main as billing_main
from tests.contract.inference.conftest import BASE, World, running_world
from tests.contract.inference.test_chat import HELLO
from tests.harness.books import write_books
from tests.harness.fixtures import SettingsFactory
from tests.harness.living import living
from tests.harness.polling import eventually
from tests.harness.servers import PostgresServer

CALLS = 200
OUTPUT_TOKENS_MAX = 40
# What `finemesh/tiny` costs: the longest call of this test, and one that stops as the stub engine does.
CALL_NANOS_USD_MAX = 20 * 50 + OUTPUT_TOKENS_MAX * 100
_numbers = itertools.count(1)


@dataclass(frozen=True, kw_only=True)
class Mesh:
    replicas: tuple[World, World]
    billing: Any
    budgets: Any
    database: asyncpg.Pool

    async def booked(self, organization: str) -> int:
        """What billing has charged for calls."""
        found = await self.database.fetchval(
            "SELECT -balance_nanos_usd FROM accounts WHERE organization_id = $1 AND account = 'receivable'",
            organization,
        )
        return int(found or 0)

    async def calls_booked(self, organization: str) -> int:
        query = (
            "SELECT count(DISTINCT split_part(work_key, ':', 1)) FROM usage_records"
            " WHERE organization_id = $1 AND kind = 'input_tokens'"
        )
        return int(await self.database.fetchval(query, organization))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def mesh(
    postgres: PostgresServer,
    make_settings: SettingsFactory,
    base_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Mesh]:
    root = tmp_path_factory.mktemp("overshoot")
    shared = make_settings()
    async with postgres.scratch() as url:
        settings = BillingSettings(
            price_books_dir=write_books(root / "books"),
            database_url=url,
            nats_url=shared.nats_url,
            tls_dir=shared.tls_dir,
            port_file=root / "billing.port",
            outbox_poll_s=0.05,
        )
        async with living(settings, lambda process: billing_main(process, settings)):
            address = f"127.0.0.1:{(root / 'billing.port').read_text().strip()}"
            given = {"billing_address": address, "stub_token_s": 0.02}
            for name in ("one", "two"):
                (root / name).mkdir()
            async with (
                running_world(make_settings, base_folder, root / "one", **given) as one,
                running_world(make_settings, base_folder, root / "two", **given) as two,
                asyncpg.create_pool(url, min_size=1, max_size=2) as database,
            ):
                channel = open_channel(make_settings("gateway"), address, "billing")
                yield Mesh(
                    replicas=(one, two),
                    billing=BillingServiceStub(channel),
                    budgets=BudgetServiceStub(channel),
                    database=database,
                )
                await channel.close()


@pytest.fixture
def caller() -> Caller:
    """Of an organization that no other test has."""
    number = next(_numbers)
    return Caller(
        service="gateway",
        tenant=f"proj_over_{number}",
        account=f"org_over_{number}",
        subject="key_1",
        roles=frozenset({"member", "admin", "operator"}),
        namespace="demo",
    )


async def pay_in(mesh: Mesh, caller: Caller, amount: int) -> None:
    with acting_as(caller):
        await mesh.billing.TopUp(billing_service_pb2.TopUpRequest(amount_nanos_usd=amount, request_id="first"))


async def chat(mesh: Mesh, caller: Caller, number: int) -> str:
    """`ok`, or why not."""
    stub = InferenceServiceStub(mesh.replicas[number % 2].channel)
    # Each prompt has an answer of its own length.
    messages = [generation_pb2.ChatMessage(role="user", content=f"hello {number}"), *HELLO]
    sampling = generation_pb2.SamplingParameters(temperature=0.0, output_tokens_max=OUTPUT_TOKENS_MAX)
    with acting_as(caller):
        try:
            await stub.Chat(inference.ChatRequest(model=BASE, messages=messages, sampling=sampling), timeout=120)
        except FailedPrecondition as refused:
            return refused.reason
    return "ok"


async def burst(mesh: Mesh, caller: Caller, limit: int) -> tuple[list[str], int]:
    """200 calls at once, half of them at each replica; the outcomes, and what they cost once all of it is booked."""
    outcomes = await asyncio.gather(*(chat(mesh, caller, number) for number in range(CALLS)))
    served = outcomes.count("ok")
    await eventually(lambda: mesh.calls_booked(caller.account), lambda count: count == served, within_s=120)
    booked = await mesh.booked(caller.account)
    print(f"\n{served} of {CALLS} calls served, {booked} of {limit} nano-dollars: overshoot {max(0, booked - limit)}")
    return outcomes, booked


async def test_calls_at_once_never_overshoot_the_credit(mesh: Mesh, caller: Caller) -> None:
    credit = 20 * CALL_NANOS_USD_MAX
    await pay_in(mesh, caller, credit)
    outcomes, booked = await burst(mesh, caller, credit)
    assert booked <= credit
    assert set(outcomes) == {"ok", "BALANCE_INSUFFICIENT"}
    # What the calls gave back can be used: one after the other they come near the end, whoever serves them.
    for number in itertools.count(CALLS):
        if await chat(mesh, caller, number) != "ok":
            break
    left = await eventually(lambda: _left(mesh, caller, credit), lambda left: 0 <= left < 2 * CALL_NANOS_USD_MAX)
    print(f"{left} nano-dollars are left")


@pytest.mark.parametrize("key", ["", "key_1"])
async def test_calls_at_once_never_overshoot_a_cap(mesh: Mesh, caller: Caller, key: str) -> None:
    await pay_in(mesh, caller, 10**12)
    cap = 20 * CALL_NANOS_USD_MAX
    request = budget_service_pb2.SetBudgetRequest(
        parent=f"projects/{caller.tenant}", api_key_id=key, monthly_cap_nanos_usd=cap
    )
    with acting_as(caller):
        await mesh.budgets.SetBudget(request)
    outcomes, booked = await burst(mesh, caller, cap)
    assert booked <= cap
    assert set(outcomes) == {"ok", "SPEND_CAP_EXCEEDED"}


async def test_a_new_organization_without_credit_is_refused(mesh: Mesh, caller: Caller) -> None:
    assert await chat(mesh, caller, 1) == "BALANCE_INSUFFICIENT"
    await pay_in(mesh, caller, 10 * CALL_NANOS_USD_MAX)
    await eventually(lambda: chat(mesh, caller, 1), lambda outcome: outcome == "ok")


async def _left(mesh: Mesh, caller: Caller, credit: int) -> int:
    return credit - await mesh.booked(caller.account)
