"""Passes calls to an endpoint on to the process that has it, once. Not pure: gRPC.

Callers reach any replica. The owner alone computes and meters; deadline, identity and cancellation travel along. It
knows neither engines nor prices.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from chassis.errors import Unavailable
from chassis.identity import current_caller
from finemesh.inference.v1 import inference_service_pb2 as pb
from finemesh.inference.v1 import inference_service_pb2_grpc
from services.inference.api.inference_service import InferenceService
from services.inference.endpoints.domain import Endpoint
from services.inference.endpoints.owners import Owners, Passed, ServedElsewhere

# The route may be old when the call arrives; then the new owner is asked.
OWNERS_ASKED_MAX = 2


class ForwardingService(inference_service_pb2_grpc.InferenceServiceServicer):
    """InferenceService as every replica offers it. A call that came from another replica is never passed on again."""

    def __init__(self, local: InferenceService, owners: Owners, *, own_name: str) -> None:
        self._local = local
        self._owners = owners
        self._own_name = own_name

    async def Chat(self, request: pb.ChatRequest, context: object) -> pb.ChatResponse:
        answer: pb.ChatResponse = await self._whole("Chat", request, context)
        return answer

    async def Complete(self, request: pb.CompleteRequest, context: object) -> pb.CompleteResponse:
        answer: pb.CompleteResponse = await self._whole("Complete", request, context)
        return answer

    async def StreamChat(self, request: pb.StreamChatRequest, context: object) -> AsyncIterator[pb.StreamChatResponse]:
        async with contextlib.aclosing(self._parts("StreamChat", request, context)) as parts:
            async for part in parts:
                yield part

    async def StreamComplete(
        self, request: pb.StreamCompleteRequest, context: object
    ) -> AsyncIterator[pb.StreamCompleteResponse]:
        async with contextlib.aclosing(self._parts("StreamComplete", request, context)) as parts:
            async for part in parts:
                yield part

    async def ListServedModels(
        self, request: pb.ListServedModelsRequest, context: object
    ) -> pb.ListServedModelsResponse:
        return await self._local.ListServedModels(request, context)

    async def _whole(self, method: str, request: Any, context: object) -> Any:
        route = _Route(may_pass_on=current_caller().service != self._own_name)
        while True:
            try:
                return await getattr(self._local, method)(request, context)
            except ServedElsewhere as elsewhere:
                endpoint = route.to(elsewhere)
            try:
                return await self._ask(endpoint, method, request)
            except Unavailable as error:
                route.failure = error

    async def _parts(self, method: str, request: Any, context: object) -> Any:
        route = _Route(may_pass_on=current_caller().service != self._own_name)
        while True:
            begun = False
            try:
                async with contextlib.aclosing(getattr(self._local, method)(request, context)) as parts:
                    async for part in parts:
                        yield part
                return
            except ServedElsewhere as elsewhere:
                endpoint = route.to(elsewhere)
            try:
                async with contextlib.aclosing(self._follow(endpoint, method, request)) as parts:
                    async for part in parts:
                        begun = True
                        yield part
                return
            except Unavailable as error:
                if begun:
                    raise
                route.failure = error

    async def _ask(self, endpoint: Endpoint, method: str, request: Any) -> Any:
        with self._owners.channel_to(endpoint) as channel:
            stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
            asked = asyncio.ensure_future(getattr(stub, method)(request))
            with self._owners.watching(endpoint, asked.cancel) as call:
                try:
                    return await asked
                except asyncio.CancelledError as error:
                    _raise_if_lost(call, error)
                    raise

    async def _follow(self, endpoint: Endpoint, method: str, request: Any) -> Any:
        with self._owners.channel_to(endpoint) as channel:
            stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
            stream = getattr(stub, method)(request)
            with self._owners.watching(endpoint, stream.cancel) as call:
                try:
                    async with contextlib.aclosing(aiter(stream)) as parts:
                        async for part in parts:
                            yield part
                except asyncio.CancelledError as error:
                    _raise_if_lost(call, error)
                    raise


class _Route:
    """Where a call was sent: to one owner, and to the next one if the endpoint was another's by then."""

    def __init__(self, *, may_pass_on: bool) -> None:
        self._may_pass_on = may_pass_on
        self._asked: list[int | None] = []
        self.failure: Unavailable | None = None

    def to(self, elsewhere: ServedElsewhere) -> Endpoint:
        """The endpoint with its owner of now; raises what the last one said when nobody else is left to ask."""
        endpoint = elsewhere.endpoint
        if not self._may_pass_on or len(self._asked) == OWNERS_ASKED_MAX or endpoint.lease_token in self._asked:
            raise self.failure or elsewhere
        self._asked.append(endpoint.lease_token)
        return endpoint


def _raise_if_lost(call: Passed, error: BaseException) -> None:
    """A call that was cancelled because its owner is gone was not cancelled by its caller."""
    task = asyncio.current_task()
    if call.lost and (task is None or not task.cancelling()):
        raise call.failure() from error
