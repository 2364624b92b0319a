"""Chat and completion with base models, tuned models and endpoints. It renders no template: the server does, once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import cast

from finemesh.inference.v1 import generation_pb2, inference_service_pb2, inference_service_pb2_grpc
from finemesh_client.transport import Transport

# The first call of a model may have to start its engine.
GENERATION_TIMEOUT_S = 300.0


def sampling(**values: object) -> generation_pb2.SamplingParameters:
    """Sampling parameters from those values that are not None."""
    return generation_pb2.SamplingParameters(**{k: v for k, v in values.items() if v is not None})  # type: ignore[arg-type]


def user(content: str) -> generation_pb2.ChatMessage:
    """A message of the user."""
    return generation_pb2.ChatMessage(role="user", content=content)


class Chat:
    """Generation. A call is not repeated by itself: it may have been metered."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._stub = inference_service_pb2_grpc.InferenceServiceStub(transport.channel)

    async def answer(
        self,
        model: str,
        messages: Sequence[generation_pb2.ChatMessage],
        parameters: generation_pb2.SamplingParameters | None = None,
    ) -> inference_service_pb2.ChatResponse:
        """The whole answer to a conversation."""
        request = inference_service_pb2.ChatRequest(model=model, messages=messages, sampling=parameters)
        answer = await self._transport.unary(self._stub.Chat, request, safe=False, timeout_s=GENERATION_TIMEOUT_S)
        return cast(inference_service_pb2.ChatResponse, answer)

    def stream(
        self,
        model: str,
        messages: Sequence[generation_pb2.ChatMessage],
        parameters: generation_pb2.SamplingParameters | None = None,
    ) -> AsyncIterator[inference_service_pb2.StreamChatResponse]:
        """The answer as it is made. Leaving the loop ends the generation."""
        request = inference_service_pb2.StreamChatRequest(model=model, messages=messages, sampling=parameters)
        return self._transport.stream(self._stub.StreamChat, request, timeout_s=GENERATION_TIMEOUT_S)

    async def complete(
        self, model: str, prompt: str, parameters: generation_pb2.SamplingParameters | None = None
    ) -> inference_service_pb2.CompleteResponse:
        """The continuation of a text, without a chat template."""
        request = inference_service_pb2.CompleteRequest(model=model, prompt=prompt, sampling=parameters)
        answer = await self._transport.unary(self._stub.Complete, request, safe=False, timeout_s=GENERATION_TIMEOUT_S)
        return cast(inference_service_pb2.CompleteResponse, answer)

    async def served_models(self) -> list[inference_service_pb2.ServedModel]:
        """What the caller can use as `model`."""
        request = inference_service_pb2.ListServedModelsRequest()
        return list((await self._transport.unary(self._stub.ListServedModels, request, safe=True)).models)
