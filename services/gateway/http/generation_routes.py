"""The routes that generate: chats and completions, whole and as streams. Not pure: protobuf, gRPC.

Each converts, calls the inference service and converts back. It knows no key and no limit of requests.
"""

from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from chassis.clock import Clock
from chassis.errors import Internal
from chassis.identity import Caller, acting_as, current_caller
from chassis.rpc import deadline
from chassis.telemetry import trace as telemetry
from finemesh.inference.v1 import inference_service_pb2 as pb
from services.gateway.config import GatewaySettings
from services.gateway.http.bodies import DONE, EventStream, event, read_body, unless_disconnected
from services.gateway.http.chat_answer import ChatChunks, chat_completion
from services.gateway.http.chat_request import read_chat
from services.gateway.http.completion_answer import CompletionChunks, text_completion
from services.gateway.http.completion_request import read_completion
from services.gateway.http.openai_errors import error_body, typed_error
from services.gateway.identity.key_watch import KeyWatch


class Chunks(Protocol):
    """Turns the messages of one streamed answer into chunks, in order."""

    def of(self, part: Any) -> list[dict[str, Any]]: ...


class GenerationRoutes:
    """`inference` is the stub of the inference service."""

    def __init__(self, inference: Any, key_watch: KeyWatch, clock: Clock, settings: GatewaySettings) -> None:
        # Any: the asynchronous twin of InferenceServiceStub exists only in the type stubs.
        self._inference = inference
        self._key_watch = key_watch
        self._clock = clock
        self._settings = settings

    async def chat(self, request: Request, caller: Caller) -> Response:
        call = read_chat(await self._body(request), self._settings.http_messages_max)
        created_s = self._now_s()
        with acting_as(caller), deadline.limit(self._settings.http_chat_s_max):
            if call.stream:
                answer = self._inference.StreamChat(call.asked(pb.StreamChatRequest))
                return await self._streamed(request, answer, ChatChunks(call, created_s))
            asked = self._inference.Chat(call.asked(pb.ChatRequest))
            whole = await unless_disconnected(request.receive, asked)
        return _whole(chat_completion(whole, call, created_s))

    async def complete(self, request: Request, caller: Caller) -> Response:
        call = read_completion(await self._body(request))
        created_s = self._now_s()
        with acting_as(caller), deadline.limit(self._settings.http_chat_s_max):
            if call.stream:
                answer = self._inference.StreamComplete(call.asked(pb.StreamCompleteRequest))
                return await self._streamed(request, answer, CompletionChunks(call, created_s))
            asked = self._inference.Complete(call.asked(pb.CompleteRequest))
            whole = await unless_disconnected(request.receive, asked)
        return _whole(text_completion(whole, call, created_s))

    async def _body(self, request: Request) -> bytes:
        settings = self._settings
        return await read_body(request, bytes_max=settings.http_body_bytes_max, seconds_max=settings.http_body_s_max)

    def _now_s(self) -> int:
        return int(self._clock.now().timestamp())

    async def _streamed(self, request: Request, answer: Any, chunks: Chunks) -> Response:
        parts = aiter(answer)
        try:
            # Waited for before the answer begins, so that a refusal still has its own status.
            first = await unless_disconnected(request.receive, anext(parts, None))
        except BaseException:
            answer.cancel()
            raise
        if first is None:
            raise Internal("INTERNAL", "the answer ended before it began")
        watched = self._key_watch.over(current_caller().subject, answer.cancel)
        return EventStream(_events(request.url.path, answer, first, parts, chunks, watched), answer_headers())


def answer_headers() -> dict[str, str]:
    return {"x-request-id": telemetry.current_trace_id()}


def _whole(document: dict[str, Any]) -> Response:
    return JSONResponse(document, headers=answer_headers())


async def _events(
    path: str,
    answer: Any,
    first: Any,
    rest: AsyncIterator[Any],
    chunks: Chunks,
    watched: AbstractContextManager[object],
) -> AsyncIterator[bytes]:
    try:
        with watched:
            yield _written(chunks, first)
            async for part in rest:
                # Everything that one message brought goes out in one write.
                yield _written(chunks, part)
        yield DONE
    except Exception as error:
        # The status is sent already; clients raise on a chunk with an error.
        yield event(error_body(typed_error(error, path)))
    finally:
        answer.cancel()


def _written(chunks: Chunks, part: Any) -> bytes:
    return b"".join(event(chunk) for chunk in chunks.of(part))
