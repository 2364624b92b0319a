"""The routes of the HTTP edge. Not pure: protobuf, gRPC.

Who calls is known, and counted, before a route begins; every failure has OpenAI's shape. What generates is in
generation_routes.py.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from chassis.clock import Clock
from chassis.errors import NotFound, Unavailable, Unimplemented
from chassis.identity import Caller, acting_as
from chassis.rpc import deadline
from chassis.rpc.call_limits import Limit, Place, Places
from chassis.telemetry import trace as telemetry
from finemesh.inference.v1 import inference_service_pb2
from services.gateway.config import GatewaySettings
from services.gateway.http import chat_answer
from services.gateway.http.bodies import EventStream
from services.gateway.http.generation_routes import GenerationRoutes
from services.gateway.http.openai_errors import error_response, typed_error
from services.gateway.identity.authenticator import Authenticator
from services.gateway.identity.key_watch import KeyWatch

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
        self._settings = settings
        self._places = _places(settings)
        self._draining = False
        generations = GenerationRoutes(inference, key_watch, clock, settings)
        self.asgi = Starlette(
            routes=[
                Route("/v1/chat/completions", self._shaped(generations.chat), methods=["POST"]),
                Route("/v1/completions", self._shaped(generations.complete), methods=["POST"]),
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
                return error_response(typed_error(error, request.url.path))
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
