"""Credit ends on the real mesh: an endpoint is parked and calls are refused at both doors;
a top-up brings both back."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import openai
import pytest
import pytest_asyncio

from finemesh.billing.v1 import balance_pb2
from finemesh.endpoints.v1 import endpoint_pb2
from finemesh_client import FinemeshError
from finemesh_client.chat import sampling, user
from tests.harness.mesh import BASE, Mesh, running_mesh
from tests.harness.polling import eventually

MINUTE_S = 0.5
# A device minute of type `cpu`; the credit lasts for twenty of them, ten seconds here.
MINUTE_NANOS_USD = 1_000_000
SHORT = sampling(temperature=0.0, output_tokens_max=2)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    async with running_mesh(
        tmp_path_factory.mktemp("credit"),
        credit_nanos_usd=20 * MINUTE_NANOS_USD,
        FINEMESH_INFERENCE_ENDPOINT_MINUTE_S=str(MINUTE_S),
    ) as running:
        yield running


async def reaches(mesh: Mesh, name: str, state: endpoint_pb2.EndpointState.ValueType) -> endpoint_pb2.Endpoint:
    look = partial(mesh.client.endpoints.get, name)
    return await eventually(look, lambda endpoint: endpoint.state == state, within_s=120)


async def cli(mesh: Mesh, *arguments: str) -> str:
    """What `finemesh billing ...` prints."""
    environment = {
        **os.environ,
        "FINEMESH_ADDRESS": mesh.client.config.address,
        "FINEMESH_API_KEY": mesh.client.config.api_key,
        "COLUMNS": "200",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from finemesh_client.cli.main import app; app()",
        "billing",
        *arguments,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return f"{output.decode()}exit {process.returncode}"


async def test_credit_ends_and_comes_back(mesh: Mesh) -> None:
    client = mesh.client
    made = await client.endpoints.create("mine", BASE)
    await reaches(mesh, made.name, endpoint_pb2.ENDPOINT_STATE_READY)
    assert (await client.chat.answer(made.endpoint_id, [user("hello")], SHORT)).choices[0].message.content
    parked = await reaches(mesh, made.name, endpoint_pb2.ENDPOINT_STATE_PARKED)
    assert "credit" in parked.status_message
    assert parked.billed_minutes >= 20
    balance = await client.billing.balance()
    assert (balance.available_nanos_usd, balance.credit_state) == (0, balance_pb2.CREDIT_STATE_EXHAUSTED)
    for model in (made.endpoint_id, BASE):
        with pytest.raises(FinemeshError, match="credit is used up") as refused:
            await client.chat.answer(model, [user("hello")], SHORT)
        assert refused.value.reason == "BALANCE_INSUFFICIENT"
    config = client.config
    async with openai.AsyncOpenAI(base_url=config.http_url, api_key=config.api_key) as openai_client:
        chat = openai_client.chat.completions
        hello: list[Any] = [{"role": "user", "content": "hello"}]
        for stream in (False, True):
            with pytest.raises(openai.APIStatusError, match="credit is used up") as told:
                await chat.create(model=BASE, messages=hello, max_tokens=2, stream=stream)
            assert (told.value.status_code, told.value.code) == (402, "insufficient_quota")
        # What was owed is paid first; enough stays for the rest of the test.
        await client.billing.top_up(10_000 * MINUTE_NANOS_USD, request_id="again")
        resumed = await reaches(mesh, made.name, endpoint_pb2.ENDPOINT_STATE_READY)
        assert resumed.model == BASE
        whole = await chat.create(model=made.endpoint_id, messages=hello, max_tokens=2)
        assert whole.choices[0].message.content
    assert "EXHAUSTED" not in await cli(mesh, "balance")
    await client.endpoints.stop(made.name)
    await reaches(mesh, made.name, endpoint_pb2.ENDPOINT_STATE_STOPPED)


async def test_a_key_at_its_cap_is_refused_with_the_numbers(mesh: Mesh) -> None:
    client = mesh.client
    await client.billing.top_up(10_000 * MINUTE_NANOS_USD, request_id="for the caps")
    assert "no key" in await cli(mesh, "budget", "set", "--cap", "1", "--key", "key_nobody")
    key_id = (await client.identity.caller()).key.name.rpartition("/")[2]
    await client.chat.answer(BASE, [user("hello")], SHORT)
    shown = await cli(mesh, "budget", "set", "--cap", "0.000000001", "--key", key_id, "--alert", "80", "--alert", "50")
    assert key_id in shown
    assert "50%, 80%" in shown
    with pytest.raises(FinemeshError, match="monthly spend cap"):
        async with asyncio.timeout(60):
            while True:
                await client.chat.answer(BASE, [user("hello")], SHORT)
    job = await mesh.ended((await client.jobs.create(mesh.spec("capped"))).name)
    assert job.error.reason == "SPEND_CAP_EXCEEDED"
    assert job.error.metadata["cap_nanos_usd"] == "1"
    assert "capped" in await cli(mesh, "budget", "list")
    assert "removed" in await cli(mesh, "budget", "delete", "--key", key_id)
    assert list(await client.budgets.list()) == []
    async with asyncio.timeout(60):
        while True:
            try:
                await client.chat.answer(BASE, [user("hello")], SHORT)
                break
            except FinemeshError as refused:
                assert refused.reason == "SPEND_CAP_EXCEEDED"
    assert "$1,000,000.00" in await cli(mesh, "low-balance", "1000000")
    assert "LOW" in await cli(mesh, "balance")
    assert "never" in await cli(mesh, "low-balance", "0")
    assert "SUFFICIENT" in await cli(mesh, "balance")
