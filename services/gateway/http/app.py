"""The routes of the HTTP edge. Not pure: protobuf, gRPC.

Each converts, calls the inference service and converts back; who calls is known by then.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Any

import structlog
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from chassis.clock import Clock
from chassis.errors import DomainError, Internal, NotFound, Unavailable, Unimplemented
from chassis.identity import Caller, acting_as, current_caller
from chassis.rpc import deadline
from chassis.rpc.call_limits import Limit, Place, Places
from chassis.rpc.untyped_errors import domain_error_of
from chassis.telemetry import trace as telemetry
from finemesh.inference.v1 import inference_service_pb2
from services.gateway.config import GatewaySettings
from services.gateway.http import chat_answer
from services.gateway.http.bodies import DONE, EventStream, event, read_body, unless_disconnected
from services.gateway.http.chat_request import ChatCall, read_chat
from services.gateway.http.openai_errors import error_body, error_response
from services.gateway.identity.authenticator import Authenticator
from services.gateway.identity.key_watch import KeyWatch

log = structlog.get_logger()

Endpoint = Callable[[Request, Caller], Awaitable[Response]]


class HttpApp:
    """Holds what the routes need; `asgi` is the application."""

    def __init__(
        self,
        inference: Any,
        authenticator: Authenticator,
        key_watch: KeyWatch,
        clock: Clock,
        settings: GatewaySettings,
    ) -> None:
        # Any: the asynchronous twin of InferenceServiceStub exists only in the type stubs.
        self._inference = inference
        self._authenticator = authenticator
        self._key_watch = key_watch
        self._clock = clock
        self._settings = settings
        self._places = _places(settings)
        self._draining = False
        self.asgi = Starlette(
            routes=[
                Route("/v1/chat/completions", self._shaped(self._chat), methods=["POST"]),
                Route("/v1/models", self._shaped(self._models), methods=["GET"]),
                # An id holds slashes, which most clients escape and some do not.
                Route("/v1/models/{model_id:path}", self._shaped(self._model), methods=["GET"]),
                Route("/healthz", self._healthz, methods=["GET"]),
            ],
            exception_handlers={404: _unknown, 405: _unknown},
        )

    async def drain(self) -> None:
        """From now on health says that this process stops."""
        self._draining = True

    async def _chat(self, request: Request, caller: Caller) -> Response:
        settings = self._settings
        body = await read_body(request, bytes_max=settings.http_body_bytes_max, seconds_max=settings.http_body_s_max)
        call = read_chat(body, settings.http_messages_max)
        created_s = int(self._clock.now().timestamp())
        with acting_as(caller), deadline.limit(settings.http_chat_s_max):
            if call.stream:
                return await self._streamed(request, call, created_s)
            asked = inference_service_pb2.ChatRequest(model=call.model, messages=call.messages, sampling=call.sampling)
            answer = await unless_disconnected(request.receive, self._inference.Chat(asked))
        return JSONResponse(chat_answer.completion(answer, call.model, created_s), headers=_headers())

    async def _streamed(self, request: Request, call: ChatCall, created_s: int) -> Response:
        asked = inference_service_pb2.StreamChatRequest(
            model=call.model, messages=call.messages, sampling=call.sampling
        )
        answer = self._inference.StreamChat(asked)
        parts = aiter(answer)
        try:
            # Waited for before the answer begins, so that a refusal still has its own status.
            first = await unless_disconnected(request.receive, anext(parts, None))
        except BaseException:
            answer.cancel()
            raise
        if first is None:
            raise Internal("INTERNAL", "the answer ended before it began")
        chunks = chat_answer.Chunks(call.model, created_s, include_usage=call.include_usage)
        watched = self._key_watch.over(current_caller().subject, answer.cancel)
        return EventStream(_events(answer, first, parts, chunks, watched), _headers())

    async def _models(self, request: Request, caller: Caller) -> Response:
        served = await self._served(caller)
        return JSONResponse({"object": "list", "data": [chat_answer.model(model) for model in served]})

    async def _model(self, request: Request, caller: Caller) -> Response:
        model_id = request.path_params["model_id"]
        for model in await self._served(caller):
            if model.model_id == model_id:
                return JSONResponse(chat_answer.model(model))
        raise NotFound("MODEL_UNKNOWN", f"there is no model {model_id[:200]}; /v1/models lists those that you can use")

    async def _served(self, caller: Caller) -> list[inference_service_pb2.ServedModel]:
        with acting_as(caller), deadline.limit(self._settings.default_deadline_s):
            answer = await self._inference.ListServedModels(inference_service_pb2.ListServedModelsRequest())
        return list(answer.models)

    async def _healthz(self, request: Request) -> Response:
        if self._draining:
            return JSONResponse({"status": "stopping"}, status_code=503)
        return JSONResponse({"status": "ok"})

    def _shaped(self, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
        """Begins the trace, finds out who calls, counts the request, and answers every failure in OpenAI's shape."""

        async def serve(request: Request) -> Response:
            telemetry.carry(request.headers.get(telemetry.TRACEPARENT_KEY))
            place: Place | None = None
            response: Response | None = None
            try:
                caller = await self._authenticator.caller(request.headers.get("authorization", ""))
                # Not before: nobody without a key takes a place.
                place = self._places.take(caller.subject)
                response = await endpoint(request, caller)
            except Exception as error:
                return error_response(_typed(error, request.url.path))
            else:
                return response
            finally:
                # An answer in parts is in flight until its last one.
                if place is not None and isinstance(response, EventStream):
                    response.on_end = place.forget
                elif place is not None:
                    place.forget()

        return serve


def _places(settings: GatewaySettings) -> Places:
    whole, part = settings.http_connections_max, settings.http_requests_per_key_max
    return Places(
        Limit(
            "http_connections_max",
            whole,
            f"{whole} requests are in flight, the most here (http_connections_max); try again in a moment",
            Unavailable,
        ),
        Limit(
            "http_requests_per_key_max",
            part,
            f"this key has {part} requests in flight, the most that one may (http_requests_per_key_max); wait for some"
            " of them to end",
        ),
    )


async def _unknown(request: Request, error: Exception) -> Response:
    return error_response(Unimplemented("NOT_OFFERED", f"there is no {request.method} {request.url.path[:200]} here"))


async def _events(
    answer: Any,
    first: inference_service_pb2.StreamChatResponse,
    rest: AsyncIterator[inference_service_pb2.StreamChatResponse],
    chunks: chat_answer.Chunks,
    watched: AbstractContextManager[object],
) -> AsyncIterator[bytes]:
    try:
        with watched:
            yield event(chunks.opening(first))
            for chunk in chunks.of(first):
                yield event(chunk)
            async for part in rest:
                # Everything that one message brought goes out in one write.
                yield b"".join(event(chunk) for chunk in chunks.of(part))
        yield DONE
    except Exception as error:
        # The status is sent already; clients raise on a chunk with an error.
        yield event(error_body(_typed(error, "/v1/chat/completions")))
    finally:
        answer.cancel()


def _typed(error: Exception, path: str) -> DomainError:
    typed = domain_error_of(error, telemetry.current_trace_id())
    if isinstance(typed, Internal):
        log.error("request_failed", path=path, exc_info=error)
    return typed


def _headers() -> dict[str, str]:
    return {"x-request-id": telemetry.current_trace_id()}
