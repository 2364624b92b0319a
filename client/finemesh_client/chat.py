"""Chat and completion with base models, tuned models and endpoints. It renders no template: the server does, once."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TypedDict, Unpack, cast

from finemesh.inference.v1 import generation_pb2, inference_service_pb2, inference_service_pb2_grpc
from finemesh_client.transport import Transport

# The first call of a model may have to start its engine.
GENERATION_TIMEOUT_S = 300.0
_MODES = {
    "auto": generation_pb2.TOOL_CHOICE_MODE_AUTO,
    "none": generation_pb2.TOOL_CHOICE_MODE_NONE,
    "required": generation_pb2.TOOL_CHOICE_MODE_REQUIRED,
}


class AnswerForm(TypedDict, total=False):
    """What an answer may hold beside text; `tool`, `tool_choice` and `json_answer` make the parts."""

    tools: Sequence[generation_pb2.Tool]
    tool_choice: generation_pb2.ToolChoice
    parallel_tool_calls: bool
    response_format: generation_pb2.ResponseFormat
    enable_thinking: bool


def sampling(**values: object) -> generation_pb2.SamplingParameters:
    """Sampling parameters from those values that are not None."""
    return generation_pb2.SamplingParameters(**{k: v for k, v in values.items() if v is not None})  # type: ignore[arg-type]


def tool(declaration: Mapping[str, object]) -> generation_pb2.Tool:
    """A tool as datasets declare it: `{"type": "function", "function": {...}}`, with the order of its keys."""
    return generation_pb2.Tool(declaration=json.dumps(declaration, ensure_ascii=False))


def tool_choice(choice: str) -> generation_pb2.ToolChoice:
    """`auto`, `none`, `required`, or the name of the function that must be called."""
    mode = _MODES.get(choice, generation_pb2.TOOL_CHOICE_MODE_FUNCTION)
    return generation_pb2.ToolChoice(mode=mode, function_name="" if choice in _MODES else choice)


def json_answer(schema: Mapping[str, object] | None = None) -> generation_pb2.ResponseFormat:
    """An answer that is JSON: one object, or what a schema allows."""
    if schema is None:
        return generation_pb2.ResponseFormat(type=generation_pb2.RESPONSE_FORMAT_TYPE_JSON_OBJECT)
    return generation_pb2.ResponseFormat(
        type=generation_pb2.RESPONSE_FORMAT_TYPE_JSON_SCHEMA, json_schema=json.dumps(schema, ensure_ascii=False)
    )


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
        **form: Unpack[AnswerForm],
    ) -> inference_service_pb2.ChatResponse:
        """The whole answer to a conversation."""
        request = inference_service_pb2.ChatRequest(model=model, messages=messages, sampling=parameters, **form)
        answer = await self._transport.unary(self._stub.Chat, request, safe=False, timeout_s=GENERATION_TIMEOUT_S)
        return cast(inference_service_pb2.ChatResponse, answer)

    def stream(
        self,
        model: str,
        messages: Sequence[generation_pb2.ChatMessage],
        parameters: generation_pb2.SamplingParameters | None = None,
        **form: Unpack[AnswerForm],
    ) -> AsyncIterator[inference_service_pb2.StreamChatResponse]:
        """The answer as it is made. Leaving the loop ends the generation."""
        request = inference_service_pb2.StreamChatRequest(model=model, messages=messages, sampling=parameters, **form)
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
