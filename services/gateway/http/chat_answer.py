"""Writes answers of chats, and models, as OpenAI's objects. Not pure: protobuf."""

from collections.abc import Mapping
from typing import Any

from finemesh.inference.v1 import generation_pb2, inference_service_pb2
from services.gateway.http.answer_parts import FINISH_REASONS, usage_of
from services.gateway.http.chat_request import ChatCall
from services.gateway.http.logprobs_answer import chat_logprobs


def chat_completion(answer: inference_service_pb2.ChatResponse, call: ChatCall, created_s: int) -> dict[str, Any]:
    return {
        "id": answer.generation_id,
        "object": "chat.completion",
        "created": created_s,
        "model": call.model,
        "choices": [
            {
                "index": choice.index,
                "message": _message(choice.message),
                "logprobs": chat_logprobs(choice.logprobs, call.logprobs),
                "finish_reason": FINISH_REASONS.get(choice.finish_reason, "stop"),
            }
            for choice in answer.choices
        ],
        "usage": usage_of(answer.usage),
        "system_fingerprint": answer.revision or None,
    }


class ChatChunks:
    """The chunks of one streamed answer; they share id, model and time."""

    def __init__(self, call: ChatCall, created_s: int) -> None:
        self._call = call
        self._base: dict[str, Any] = {
            "id": "",
            "object": "chat.completion.chunk",
            "created": created_s,
            "model": call.model,
            "system_fingerprint": None,
        }
        # Choices of which it was said who speaks.
        self._begun: set[int] = set()

    def of(self, part: inference_service_pb2.StreamChatResponse) -> list[dict[str, Any]]:
        """The chunks for one message: who speaks, what is new, the end, and the usage where it was asked for."""
        self._base["id"] = part.generation_id or self._base["id"]
        self._base["system_fingerprint"] = part.revision or self._base["system_fingerprint"]
        chunks = []
        if part.choice not in self._begun:
            self._begun.add(part.choice)
            chunks.append(self._chunk(part.choice, {"role": "assistant", "content": ""}))
        delta = _delta(part)
        if delta or part.logprobs:
            logprobs = chat_logprobs(part.logprobs, self._call.logprobs) if part.logprobs else None
            chunks.append(self._chunk(part.choice, delta, logprobs=logprobs))
        if part.finish_reason:
            reason = FINISH_REASONS.get(part.finish_reason, "stop")
            chunks.append(self._chunk(part.choice, {}, finish_reason=reason))
        if part.HasField("usage") and self._call.include_usage:
            chunks.append({**self._base, "choices": [], "usage": usage_of(part.usage)})
        return chunks

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = {**self._base, "choices": [choice]}
        if self._call.include_usage:
            chunk["usage"] = None
        return chunk


def model(served: inference_service_pb2.ServedModel) -> dict[str, Any]:
    return {"id": served.model_id, "object": "model", "created": served.create_time_s, "owned_by": served.owner}


def _message(message: generation_pb2.ChatMessage) -> dict[str, Any]:
    """A call of tools without a text has no content, as OpenAI's server says it."""
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in message.tool_calls
    ]
    content = message.content if message.content or not calls else None
    written = {"role": "assistant", "content": content, "refusal": None, **_reasoning(message.reasoning)}
    return {**written, "tool_calls": calls} if calls else written


def _delta(part: inference_service_pb2.StreamChatResponse) -> dict[str, Any]:
    delta: dict[str, Any] = _reasoning(part.reasoning_delta)
    if part.text_delta:
        delta["content"] = part.text_delta
    if part.tool_calls:
        delta["tool_calls"] = [_call_delta(call) for call in part.tool_calls]
    return delta


def _call_delta(call: inference_service_pb2.ToolCallDelta) -> dict[str, Any]:
    """Id, type and name stand in a call's first delta only: clients add up the texts of all."""
    function = {"arguments": call.arguments_delta}
    if not call.id and not call.name:
        return {"index": call.index, "function": function}
    return {"index": call.index, "id": call.id, "type": "function", "function": {"name": call.name, **function}}


def _reasoning(text: str) -> dict[str, Any]:
    """By both of the names that are in use: DeepSeek's, and Together's and vLLM's."""
    return {"reasoning_content": text, "reasoning": text} if text else {}
