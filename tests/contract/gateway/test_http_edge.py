"""The HTTP edge as the real `openai` client meets it, before a scripted engine."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from openai.types.chat import ChatCompletionMessageParam

from chassis.errors import FailedPrecondition, FieldViolation, InvalidArgument, NotFound, ResourceExhausted, Unavailable
from tests.contract.gateway.world import World, gateway_world
from tests.harness.polling import eventually

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]
MODEL = "acme/reader"


def client_of(world: World, secret: str | None = None) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{world.http_port}/v1", api_key=secret or world.acme.secret, max_retries=0
    )


@pytest_asyncio.fixture(loop_scope="session")
async def client(world: World) -> AsyncIterator[openai.AsyncOpenAI]:
    async with client_of(world) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="session")
async def http(world: World) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"authorization": f"Bearer {world.acme.secret}"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{world.http_port}", headers=headers) as http:
        yield http


async def test_a_plain_answer(world: World, client: openai.AsyncOpenAI):
    answer = await client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=7, temperature=0, stop=["x"], seed=3
    )
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Hello world", "length")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 2, 7)
    assert (answer.id, answer.object, answer.model, answer.system_fingerprint) == (
        "gen-1",
        "chat.completion",
        MODEL,
        "rv_1",
    )
    asked = world.inference.request
    assert (asked.model, asked.messages[0].content, asked.sampling.output_tokens_max) == (MODEL, "Hi", 7)
    assert world.inference.caller is not None
    assert (world.inference.caller.tenant, world.inference.caller.namespace) == (world.acme.project_id, "acme")


async def test_a_streamed_answer(world: World, client: openai.AsyncOpenAI):
    stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "Hello", " world", None]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, "stop"]
    assert {(chunk.id, chunk.object, chunk.model) for chunk in chunks} == {("gen-1", "chat.completion.chunk", MODEL)}
    assert all(chunk.usage is None for chunk in chunks)


async def test_a_streamed_answer_with_usage(client: openai.AsyncOpenAI):
    stream = await client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 7
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_text_arrives_while_it_is_made(world: World, client: openai.AsyncOpenAI):
    world.inference.gate.clear()
    stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    texts = aiter(stream)
    assert [(await anext(texts)).choices[0].delta.content for _ in range(2)] == ["", "Hello"]
    world.inference.gate.set()
    assert (await anext(texts)).choices[0].delta.content == " world"


async def test_the_wire_form_of_a_stream(http: httpx.AsyncClient):
    answer = await http.post("/v1/chat/completions", json={"model": MODEL, "messages": HELLO, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in answer.headers
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])
    assert len(answer.headers["x-request-id"]) == 32


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "kind", "param", "code"),
    [
        (NotFound("MODEL_UNKNOWN", "no such model"), 404, openai.NotFoundError, None, "model_not_found"),
        (
            InvalidArgument(
                "INVALID_FIELD", "too hot", violations=[FieldViolation("sampling.output_tokens_max", "too many")]
            ),
            400,
            openai.BadRequestError,
            "max_tokens",
            "invalid_field",
        ),
        (
            InvalidArgument("CONTEXT_TOO_LONG", "too long"),
            400,
            openai.BadRequestError,
            None,
            "context_length_exceeded",
        ),
        (
            ResourceExhausted("RATE_LIMITED", "slow down", retry_after_s=1.5),
            429,
            openai.RateLimitError,
            None,
            "rate_limit_exceeded",
        ),
        (
            FailedPrecondition("BALANCE_INSUFFICIENT", "add credit"),
            402,
            openai.APIStatusError,
            None,
            "insufficient_quota",
        ),
        (
            FailedPrecondition("SPEND_CAP_EXCEEDED", "raise the cap"),
            402,
            openai.APIStatusError,
            None,
            "billing_hard_limit_reached",
        ),
        (Unavailable("ENGINE_FAILED", "engine died"), 503, openai.InternalServerError, None, "engine_failed"),
        (RuntimeError("secret text"), 500, openai.InternalServerError, None, "internal"),
    ],
)
async def test_errors_have_openais_shape(world: World, client, failure, status, kind, param, code, stream):
    world.inference.failure = failure
    with pytest.raises(kind) as told:
        await client.chat.completions.create(model=MODEL, messages=HELLO, stream=stream)
    assert (told.value.status_code, told.value.param, told.value.code) == (status, param, code)
    assert told.value.body["message"]
    assert "secret" not in str(told.value)
    assert told.value.request_id
    if status == 429:
        assert told.value.response.headers["retry-after"] == "2"
    if status == 402:
        # A lack of money is nothing that a client mends by asking again.
        assert told.value.response.headers["x-should-retry"] == "false"


async def test_an_error_in_the_middle_of_a_stream_is_raised_by_the_client(world: World, client: openai.AsyncOpenAI):
    world.inference.failure_later = Unavailable("ENGINE_FAILED", "the engine stopped")
    stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    with pytest.raises(openai.APIError, match="the engine stopped"):
        async for _ in stream:
            continue


@pytest.mark.parametrize("secret", ["nonsense", "fm_x"])
async def test_a_wrong_key_is_refused(world: World, secret: str):
    async with client_of(world, secret) as client:
        for call in (client.models.list(), client.chat.completions.create(model=MODEL, messages=HELLO)):
            with pytest.raises(openai.AuthenticationError) as told:
                await call
            assert told.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/models"), ("GET", "/v1/models/a/b"), ("POST", "/v1/chat/completions"), ("POST", "/v1/completions")],
)
async def test_a_missing_key_is_refused(http: httpx.AsyncClient, method: str, path: str):
    answer = await http.request(method, path, headers={"authorization": ""})
    assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")


async def test_models_are_listed_and_found_by_id(world: World, client: openai.AsyncOpenAI, http: httpx.AsyncClient):
    listed = await client.models.list()
    assert [(model.id, model.owned_by) for model in listed.data] == [
        ("finemesh/demo-llama", "finemesh"),
        ("acme/reader", "acme"),
    ]
    assert (await client.models.retrieve("acme/reader")).created == 1_900_000_001
    assert (await http.get("/v1/models/acme/reader")).json()["object"] == "model"
    with pytest.raises(openai.NotFoundError) as told:
        await client.models.retrieve("acme/unknown")
    assert told.value.code == "model_not_found"
    assert world.inference.caller is not None
    assert world.inference.caller.tenant == world.acme.project_id


@pytest.mark.parametrize(("field", "value"), [("functions", [{"name": "f"}]), ("modalities", ["audio"])])
async def test_what_is_not_offered_is_refused_by_name(client: openai.AsyncOpenAI, field, value):
    asked: dict[str, Any] = {field: value}
    with pytest.raises(openai.BadRequestError) as told:
        await client.chat.completions.create(model=MODEL, messages=HELLO, **asked)
    assert told.value.param == field


async def test_a_body_over_the_limit_is_refused(database_url, tls_dir, tmp_path):
    async with gateway_world(database_url, tls_dir, tmp_path, http_body_bytes_max=2000) as world:
        headers = {"authorization": f"Bearer {world.acme.secret}"}
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{world.http_port}", headers=headers) as http:
            body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "x" * 3000}]}).encode()

            async def pieces() -> AsyncIterator[bytes]:
                for start in range(0, len(body), 100):
                    yield body[start : start + 100]

            for content in (body, pieces()):
                answer = await http.post("/v1/chat/completions", content=content)
                assert (answer.status_code, answer.json()["error"]["code"]) == (413, "size_limit")


async def test_an_unknown_path_is_a_shaped_error(http: httpx.AsyncClient):
    answer = await http.post("/v1/embeddings", json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_offered")
    answer = await http.get("/v1/chat/completions")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_offered")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_the_generation(world: World, http: httpx.AsyncClient, stream: bool):
    world.inference.gate.clear()
    body = {"model": MODEL, "messages": HELLO, "stream": stream}
    if stream:
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if "Hello" in line:
                    break
    else:
        call = asyncio.create_task(http.post("/v1/chat/completions", json=body))
        await asyncio.wait_for(world.inference.started.wait(), 60)
        call.cancel()
    await asyncio.wait_for(world.inference.cancelled.wait(), 60)


async def test_an_answer_in_parts_counts_until_its_end_and_health_never(
    database_url: str, tls_dir: Path, tmp_path: Path
) -> None:
    async with (
        gateway_world(database_url, tls_dir, tmp_path, http_connections_max=1) as world,
        client_of(world) as client,
    ):
        world.inference.gate.clear()
        stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        texts = aiter(stream)
        await anext(texts)
        with pytest.raises(openai.InternalServerError) as caught:
            await client.models.list()
        assert "http_connections_max" in caught.value.message
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{world.http_port}") as stranger:
            assert (await stranger.get("/healthz")).status_code == 200
        world.inference.gate.set()
        assert [chunk async for chunk in texts]

        # The last part is read before the server has counted it off.
        await eventually(lambda: is_served(client))


async def is_served(client: openai.AsyncOpenAI) -> bool:
    try:
        await client.models.list()
    except openai.InternalServerError:
        return False
    return True


async def test_health_needs_no_key(http: httpx.AsyncClient):
    answer = await http.get("/healthz", headers={"authorization": ""})
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


async def test_a_client_that_stops_reading_loses_its_connection_and_its_place(
    database_url: str, tls_dir: Path, tmp_path: Path
) -> None:
    limits = {"http_connections_max": 1, "stalled_reader_s_max": 0.5}
    async with gateway_world(database_url, tls_dir, tmp_path, **limits) as world, client_of(world) as client:
        # More than the sockets and gRPC keep for a reader.
        world.inference.words = ["x" * 65536] * 500
        body = json.dumps({"model": MODEL, "messages": HELLO, "stream": True})
        reading = socket.socket()
        reading.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reading.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(reading, ("127.0.0.1", world.http_port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {world.acme.secret}\r\n"
        await loop.sock_sendall(reading, f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
        assert (await loop.sock_recv(reading, 15)).startswith(b"HTTP/1.1 200")
        # It reads no more.
        await asyncio.wait_for(world.inference.cancelled.wait(), 60)
        await eventually(lambda: is_served(client))
        reading.close()
