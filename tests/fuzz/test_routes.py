"""Every route of the HTTP edge: whatever a request holds, the answer is typed, and never a 500."""

import asyncio
import json
import string
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chassis.clock import SystemClock
from services.gateway.config import GatewaySettings
from services.gateway.http.app import HttpApp
from tests.fuzz.mesh import BASE, FuzzedMesh
from tests.fuzz.messages import TEXTS
from tests.fuzz.outcome import judge_text
from tests.fuzz.run import fuzzed

ANSWER_S_MAX = 30.0
# What the parser says of its own before there is a request that the application could answer.
NO_HTTP = b"Invalid HTTP request received."
APP: Any = HttpApp(None, None, None, SystemClock(), GatewaySettings())  # type: ignore[arg-type]
ROUTES = [(route.path, method) for route in APP.asgi.routes for method in sorted(route.methods)]
METHODS = st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
BODIES = (
    b"",
    b"{}",
    b"[]",
    b"null",
    b"\xff\xfe",
    b"\xef\xbb\xbf{}",
    b"[" * 5000,
    b'{"a":' * 3000,
    b'{"model":"' + BASE.encode() + b'","messages":' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"temperature":NaN}',
    b'{"temperature":-Infinity}',
    b'{"temperature":1e999}',
    b'{"seed":' + b"9" * 5000 + b"}",
    b'{"seed":-0}',
    b'{"model":"a","model":"b"}',
    b'{"\\ud800":1}',
    b'{"user":"\\u0000"}',
    b'{"metadata":{"\\udc00":"\\u0000"}}',
    b'{"model":"\\ud800"}',
    b"--x\r\ncontent-disposition: form-data; name=model\r\n\r\na\r\n--x--",
    b"model=a&messages=b",
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**25), 10**25) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
CALL = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": TEXTS, "arguments": st.just('{"a": 1}') | JSON}) | JSON},
    optional={"id": st.just("c1") | JSON, "type": JSON},
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "system", "assistant", "developer", "tool"]),
        "content": TEXTS | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS}), max_size=2),
    },
    optional={
        "name": TEXTS | JSON,
        "reasoning_content": TEXTS | JSON,
        "tool_calls": st.lists(CALL, max_size=2) | JSON,
        "tool_call_id": st.just("c1") | JSON,
    },
)
TOOL = st.fixed_dictionaries(
    {
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": st.just("f") | TEXTS}, optional={"parameters": JSON}),
    }
)
# What both routes that generate read.
SAMPLING = {
    "max_tokens": st.sampled_from([1, 2, 0, -1, 2**31, 1.5]) | JSON,
    "temperature": st.sampled_from([0, 0.5, 1e308, -1]) | JSON,
    "top_p": st.sampled_from([0, 0.5, 2]) | JSON,
    "top_k": st.sampled_from([-1, 0, 2**31]) | JSON,
    "min_p": st.sampled_from([0, 0.5, 2]) | JSON,
    "repetition_penalty": st.sampled_from([0, 1, 1e308]) | JSON,
    "min_tokens": st.sampled_from([0, 1, 2**31]) | JSON,
    "ignore_eos": st.booleans() | JSON,
    "stop": st.lists(TEXTS, max_size=5) | JSON,
    "seed": st.sampled_from([0, -(2**63), 2**63]) | JSON,
    "n": st.sampled_from([1, 2, 2**31 - 1]) | JSON,
    "logit_bias": st.dictionaries(st.sampled_from(["0", "1", "2147483647", "-1", "x"]), st.just(-100) | JSON) | JSON,
    "logprobs": st.booleans() | st.integers(-1, 30) | JSON,
    "stream": st.booleans() | JSON,
    "stream_options": st.just({"include_usage": True}) | JSON,
    "metadata": JSON,
    "response_format": st.sampled_from([{"type": "json_object"}, {"type": "json_schema", "schema": {}}]) | JSON,
}
COMPLETION = st.fixed_dictionaries(
    {"model": st.just(BASE) | JSON, "prompt": TEXTS | JSON},
    optional={**SAMPLING, "echo": st.booleans() | JSON, "best_of": st.just(1) | JSON, "suffix": JSON},
)
CHAT = st.fixed_dictionaries(
    {"model": st.just(BASE) | JSON, "messages": st.lists(MESSAGE, min_size=1, max_size=3) | JSON},
    optional={
        **SAMPLING,
        "max_completion_tokens": st.just(2) | JSON,
        "top_logprobs": st.integers(-1, 30) | JSON,
        "tools": st.lists(TOOL, max_size=2) | JSON,
        "tool_choice": st.sampled_from(["auto", "none", "required"]) | JSON,
        "parallel_tool_calls": st.booleans() | JSON,
        "chat_template_kwargs": st.just({"enable_thinking": True}) | JSON,
        "reasoning": st.just({"enabled": False}) | JSON,
    },
)
DOCUMENT = (CHAT | COMPLETION).map(lambda document: json.dumps(document).encode())
BODY = st.one_of(
    DOCUMENT,
    DOCUMENT,
    st.sampled_from(BODIES),
    st.binary(max_size=50),
    st.builds(
        lambda document, at, noise: document[: at % len(document)] + noise + document[at % len(document) :],
        DOCUMENT,
        st.integers(0, 10**6),
        st.binary(max_size=4),
    ),
)
VALUE = st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), max_size=30).map(str.strip)
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "content-type": st.sampled_from(["application/json", "multipart/form-data; boundary=x", "text/plain", ""])
        | VALUE,
        "traceparent": st.sampled_from(["00-0-0-0", "00-" + "f" * 32 + "-" + "f" * 16 + "-01"]) | VALUE,
        "accept": VALUE,
        "cookie": VALUE,
        "x-forwarded-for": VALUE,
        "x-finemesh-tenant": VALUE,
    },
)
# What may stand in a path as it is; everything else has to be escaped, and some of it is not.
ESCAPED = st.sampled_from(
    ["%00", "%ff", "%c0%af", "%ed%a0%80", "%", "%zz", "..%2f..%2fetc", "//", "%0d%0a", "a" * 3000]
)
PLACE = st.one_of(ESCAPED, st.text(string.printable, max_size=10).map(quote), TEXTS.map(lambda text: quote(text)))
QUERY = st.one_of(st.just(""), st.builds("?{}={}".format, PLACE, PLACE), st.just("?limit=-1&limit=x&%ff"))


async def ask(mesh: FuzzedMesh, content: bytes) -> tuple[int, dict[str, str], bytes]:
    """The answer to a request of these bytes, on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", mesh.ports["http"])
    try:
        async with asyncio.timeout(ANSWER_S_MAX):
            writer.write(content)
            await writer.drain()
            answer = await reader.read()
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    return int(lines[0].split(" ")[1]), headers, body


def request(mesh: FuzzedMesh, method: str, target: str, headers: dict[str, str], body: bytes, *, key: bool) -> bytes:
    given = {"host": "localhost", "connection": "close", "content-length": str(len(body)), **headers}
    if key:
        given["authorization"] = f"Bearer {mesh.tenant.api_key}"
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def judge(status: int, headers: dict[str, str], body: bytes, sent: bytes) -> None:
    if (status, body) == (400, NO_HTTP):
        return
    assert 200 <= status < 500 or status in (503, 504), f"{status}: {body!r}\nsent: {sent!r}"
    if status < 400:
        return
    if sent.startswith(b"HEAD "):
        return
    assert headers.get("content-type") == "application/json", f"{status} {headers}: {body!r}\nsent: {sent!r}"
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    judge_text(error["message"], sent)


@pytest.mark.parametrize(("path", "method"), ROUTES)
@fuzzed(6)
@given(data=st.data())
async def test_no_request_makes_a_defect(fuzzed_mesh: FuzzedMesh, path: str, method: str, data: Any) -> None:
    before, parameter, _ = path.partition("{")
    target = before + (data.draw(PLACE) if parameter else "") + data.draw(QUERY)
    sent = request(
        fuzzed_mesh,
        data.draw(st.just(method) | st.just(method) | METHODS),
        target,
        data.draw(HEADERS),
        data.draw(BODY),
        key=data.draw(st.integers(0, 5)) > 0,
    )
    judge(*await ask(fuzzed_mesh, sent), sent)


@fuzzed(6)
@given(method=METHODS, target=PLACE, query=QUERY, headers=HEADERS, body=BODY)
async def test_no_path_makes_a_defect(
    fuzzed_mesh: FuzzedMesh, method: str, target: str, query: str, headers: dict[str, str], body: bytes
) -> None:
    sent = request(fuzzed_mesh, method, f"/{target}{query}", headers, body, key=True)
    judge(*await ask(fuzzed_mesh, sent), sent)


async def test_the_edge_answers_afterwards(fuzzed_mesh: FuzzedMesh) -> None:
    body = json.dumps({"model": BASE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}).encode()
    status, _, answer = await ask(fuzzed_mesh, request(fuzzed_mesh, "POST", "/v1/chat/completions", {}, body, key=True))
    assert status == 200, answer
