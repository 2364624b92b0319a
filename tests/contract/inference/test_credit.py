"""Calls are reserved from leases of credit: who asks billing and when, what a long answer reserves, and what happens
while billing is away."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from chassis.errors import DomainError, FailedPrecondition, InvalidArgument, Unavailable
from finemesh.endpoints.v1 import endpoint_service_pb2 as endpoints
from finemesh.endpoints.v1.endpoint_service_pb2_grpc import EndpointServiceStub
from finemesh.events.v1 import usage_events_pb2
from finemesh.inference.v1 import generation_pb2
from finemesh.inference.v1 import inference_service_pb2 as inference
from finemesh.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.contract.inference.conftest import BASE, World, running_world
from tests.contract.inference.scripted_billing import INPUT_NANOS_USD, MINUTE_NANOS_USD, OUTPUT_NANOS_USD
from tests.contract.inference.test_chat import HELLO, metered
from tests.contract.inference.test_endpoints import create, reaches
from tests.harness.fixtures import SettingsFactory
from tests.harness.polling import eventually

PART_TOKENS = 4
# The stub engine answers `HELLO` with more than this.
ANSWER_TOKENS_MIN = 8
PROMPT_TOKENS = 6
LONG = generation_pb2.SamplingParameters(temperature=0, output_tokens_max=200)
SHORT = generation_pb2.SamplingParameters(temperature=0, output_tokens_max=2)
_numbers = itertools.count(1)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(
    make_settings: SettingsFactory, base_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    """Answers reserve a few tokens at a time, and leases are looked after all the time."""
    root = tmp_path_factory.mktemp("credit")
    settings = {"credit_part_tokens": PART_TOKENS, "credit_renewal_s": 0.05, "credit_refusal_s": 0.05}
    async with running_world(make_settings, base_folder, root, credit_idle_s=1.0, **settings) as made:
        yield made


@pytest.fixture
def project() -> str:
    """A project, and so an organization, that no other test has."""
    return f"proj_credit_{next(_numbers)}"


async def test_an_endpoint_whose_first_minutes_cannot_be_paid_does_not_start(world: World, project: str) -> None:
    stub = EndpointServiceStub(world.channel)
    minutes_min = world.settings.endpoint_minutes_covered_min
    with world.caller(project):
        made = await create(world, request_id="r1")
        await stub.StopEndpoint(endpoints.StopEndpointRequest(name=made.name))
        await reaches(world, made.name, "STOPPED")
        world.billing.credit[f"org_of_{project}"] = minutes_min * MINUTE_NANOS_USD - 1
        for refusing in (stub.StartEndpoint(endpoints.StartEndpointRequest(name=made.name)), create(world)):
            with pytest.raises(FailedPrecondition) as refused:
                await refusing
            assert (refused.value.reason, refused.value.metadata["shortfall_nanos_usd"]) == (
                "BALANCE_INSUFFICIENT",
                "1",
            )
        # What was asked for before is answered, not made again.
        assert (
            await create(world, endpoint_name=made.endpoint_id.rpartition("/")[2], request_id="r1")
        ).name == made.name
        world.billing.credit[f"org_of_{project}"] += 1
        await stub.StartEndpoint(endpoints.StartEndpointRequest(name=made.name))
        await reaches(world, made.name, "READY")
        await stub.StopEndpoint(endpoints.StopEndpointRequest(name=made.name))
        await reaches(world, made.name, "STOPPED")


def price(input_tokens: int, output_tokens: int) -> int:
    return input_tokens * INPUT_NANOS_USD + output_tokens * OUTPUT_NANOS_USD


async def chat(world: World, project: str, sampling: generation_pb2.SamplingParameters = SHORT) -> None:
    request = inference.ChatRequest(model=BASE, messages=HELLO, sampling=sampling)
    with world.caller(project):
        await InferenceServiceStub(world.channel).Chat(request)


async def leased(world: World, project: str) -> int:
    return sum(total for whose, total in world.billing.leases.values() if whose == f"org_of_{project}")


async def test_calls_that_fit_into_a_lease_ask_nobody(world: World, project: str) -> None:
    await chat(world, project)
    granted = world.billing.grants
    for _ in range(20):
        await chat(world, project)
    assert world.billing.grants == granted
    # Nobody uses it any more: it is given back but for what was used, which its usage records name.
    used = 21 * price(PROMPT_TOKENS, 2)
    await eventually(lambda: leased(world, project), lambda total: total == used)
    (lease_id,) = [id for id, (whose, _) in world.billing.leases.items() if whose == f"org_of_{project}"]
    records = [each for each in (await metered(world)).values() if each.project_id == project]
    assert [each.credit_lease_id for each in records] == [lease_id] * 21


async def test_a_call_that_cannot_be_paid_is_refused_with_the_numbers_and_the_cure(world: World, project: str) -> None:
    world.billing.credit[f"org_of_{project}"] = price(PROMPT_TOKENS, 10)
    # The whole of a plain answer is reserved: cut, it would be paid and lost.
    with pytest.raises(FailedPrecondition) as refused:
        await chat(world, project, LONG)
    assert refused.value.reason == "BALANCE_INSUFFICIENT"
    assert "finemesh billing top-up" in refused.value.message
    needed, there = price(PROMPT_TOKENS, 200), price(PROMPT_TOKENS, 10)
    assert refused.value.metadata == {
        "required_nanos_usd": str(needed),
        "available_nanos_usd": str(there),
        "shortfall_nanos_usd": str(needed - there),
    }
    assert [each for each in (await metered(world)).values() if each.project_id == project] == []
    # A smaller one fits, and a larger one does when credit has come.
    await chat(world, project)
    world.billing.credit[f"org_of_{project}"] += needed
    await eventually(lambda: outcome(world, project, LONG), lambda found: found == "ok")


async def outcome(world: World, project: str, sampling: generation_pb2.SamplingParameters = SHORT) -> str:
    try:
        await chat(world, project, sampling)
    except DomainError as error:
        return error.reason
    return "ok"


async def test_a_long_stream_reserves_as_it_goes_and_ends_when_nothing_is_left(world: World, project: str) -> None:
    stub = InferenceServiceStub(world.channel)
    request = inference.StreamChatRequest(model=BASE, messages=HELLO, sampling=LONG)
    world.billing.credit[f"org_of_{project}"] = price(PROMPT_TOKENS, PART_TOKENS)
    parts = []
    with world.caller(project), pytest.raises(FailedPrecondition, match="BALANCE_INSUFFICIENT") as refused:
        async for part in stub.StreamChat(request):
            parts.append(part)  # noqa: PERF401
    assert f"the answer, which has {PART_TOKENS} tokens" in refused.value.message
    assert len("".join(part.text_delta for part in parts).split()) == PART_TOKENS

    async def told() -> list[usage_events_pb2.InferenceUsage]:
        return [each for each in (await metered(world)).values() if each.project_id == project]

    # A call that was cut off does not wait for its record.
    (record,) = await eventually(told)
    assert (record.input_tokens, record.output_tokens) == (PROMPT_TOKENS, PART_TOKENS)
    # With enough it goes on to its end, far beyond what it reserved at first.
    world.billing.credit[f"org_of_{project}"] = price(0, 500)

    async def streamed() -> int:
        with world.caller(project):
            try:
                return [part async for part in stub.StreamChat(request)][-1].usage.output_tokens
            except FailedPrecondition:
                return 0

    assert await eventually(streamed) >= ANSWER_TOKENS_MIN


async def test_with_billing_away_calls_go_on_from_the_lease_that_is_left(
    make_settings: SettingsFactory, base_folder: Path, tmp_path: Path
) -> None:
    project, settings = "proj_away", {"credit_renewal_s": 0.05, "credit_idle_s": 60.0}
    async with running_world(make_settings, base_folder, tmp_path, **settings) as world:
        credit = world.billing.credit[f"org_of_{project}"] = 80 * price(PROMPT_TOKENS, 2)
        await chat(world, project)
        left = await leased(world, project)
        assert 0 < left < credit
        world.billing.away = True
        served = 1
        while (found := await outcome(world, project)) == "ok":
            served += 1
        assert found == "DEPENDENCY_UNAVAILABLE"
        assert served == left // price(PROMPT_TOKENS, 2) > 1
        world.billing.away = False
        await chat(world, project)


async def test_a_lease_that_was_not_renewed_in_time_is_not_used(
    make_settings: SettingsFactory, base_folder: Path, tmp_path: Path
) -> None:
    settings = {"credit_renewal_s": 0.05, "credit_idle_s": 60.0}
    async with running_world(make_settings, base_folder, tmp_path, **settings) as world:
        await chat(world, "proj_a")
        world.billing.lifetime_s, before = 0.5, world.billing.renewals

        async def renewals() -> int:
            return world.billing.renewals - before

        # One may have been under way.
        await eventually(renewals, lambda count: count >= 2)
        world.billing.away = True
        # There is plenty in the lease; only its end stops the calls.
        found = await eventually(lambda: outcome(world, "proj_a"), lambda found: found != "ok", pause_s=0.1)
        assert found == "DEPENDENCY_UNAVAILABLE"
        with pytest.raises(Unavailable, match="billing has to be asked") as refused:
            await chat(world, "proj_a")
        assert refused.value.retry_after_s
        world.billing.away = False
        await eventually(lambda: outcome(world, "proj_a"), lambda found: found == "ok")


async def test_what_is_recalled_is_given_back_and_what_stops_gives_all(
    make_settings: SettingsFactory, base_folder: Path, tmp_path: Path
) -> None:
    settings = {"credit_renewal_s": 0.05, "credit_idle_s": 60.0}
    async with running_world(make_settings, base_folder, tmp_path, **settings) as world:
        await chat(world, "proj_a")
        ((lease_id, (_, granted)),) = world.billing.leases.items()
        used = price(PROMPT_TOKENS, 2)
        assert granted > used
        world.billing.recalled.append(lease_id)
        await eventually(lambda: leased(world, "proj_a"), lambda total: total == used)
        await chat(world, "proj_a")
        assert await leased(world, "proj_a") > 2 * used
    assert await leased(world, "proj_a") == 2 * used


async def test_what_costs_nothing_or_by_the_minute_needs_no_credit(world: World, project: str) -> None:
    with world.caller(project):
        endpoint = await create(world)
        await reaches(world, endpoint.name, "READY")
        world.billing.credit[f"org_of_{project}"] = 0
        assert await outcome(world, project) == "BALANCE_INSUFFICIENT"
        request = inference.ChatRequest(model=endpoint.endpoint_id, messages=HELLO, sampling=SHORT)
        await InferenceServiceStub(world.channel).Chat(request)


async def test_prices_decide_before_anything_is_done(
    make_settings: SettingsFactory, base_folder: Path, tmp_path: Path
) -> None:
    async with running_world(make_settings, base_folder, tmp_path) as world:
        world.billing.unpriced.add(BASE)
        with pytest.raises(InvalidArgument, match="PRICE_UNKNOWN"):
            await chat(world, "proj_a")
        world.billing.unpriced.clear()
        world.billing.free.add(BASE)
        world.billing.credit["org_of_proj_a"] = 0
        await chat(world, "proj_a")
        assert world.billing.grants == 0


async def test_calls_that_come_together_ask_once(world: World, project: str) -> None:
    granted = world.billing.grants
    await asyncio.gather(*(chat(world, project) for _ in range(50)))
    assert world.billing.grants - granted <= 3
