"""Writes answers of the inference service as OpenAI's objects. Not pure: protobuf."""

from typing import Any

from finemesh.inference.v1 import generation_pb2, inference_service_pb2

_FINISH_REASONS = {generation_pb2.FINISH_REASON_STOP: "stop", generation_pb2.FINISH_REASON_LENGTH: "length"}


def completion(answer: inference_service_pb2.ChatResponse, model: str, created_s: int) -> dict[str, Any]:
    choices = [
        {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.message.content, "refusal": None},
            "logprobs": None,
            "finish_reason": _FINISH_REASONS.get(choice.finish_reason, "stop"),
        }
        for choice in answer.choices
    ]
    return {
        "id": answer.generation_id,
        "object": "chat.completion",
        "created": created_s,
        "model": model,
        "choices": choices,
        "usage": _usage(answer.usage),
        "system_fingerprint": answer.revision or None,
    }


class Chunks:
    """The chunks of one streamed answer; they share id, model and time."""

    def __init__(self, model: str, created_s: int, *, include_usage: bool) -> None:
        self._model = model
        self._created_s = created_s
        self._include_usage = include_usage
        self._generation_id = ""
        self._revision: str | None = None

    def opening(self, first: inference_service_pb2.StreamChatResponse) -> dict[str, Any]:
        """Says who speaks, before any text."""
        self._generation_id = first.generation_id
        self._revision = first.revision or None
        return self._chunk({"role": "assistant", "content": ""})

    def of(self, part: inference_service_pb2.StreamChatResponse) -> list[dict[str, Any]]:
        """The chunks for one message: text, the end, and the usage where it was asked for."""
        chunks = []
        if part.text_delta:
            chunks.append(self._chunk({"content": part.text_delta}))
        if part.finish_reason:
            chunks.append(self._chunk({}, _FINISH_REASONS.get(part.finish_reason, "stop")))
            if self._include_usage:
                chunks.append({**self._base(), "choices": [], "usage": _usage(part.usage)})
        return chunks

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        chunk = {**self._base(), "choices": [choice]}
        if self._include_usage:
            chunk["usage"] = None
        return chunk

    def _base(self) -> dict[str, Any]:
        return {
            "id": self._generation_id,
            "object": "chat.completion.chunk",
            "created": self._created_s,
            "model": self._model,
            "system_fingerprint": self._revision,
        }


def model(served: inference_service_pb2.ServedModel) -> dict[str, Any]:
    return {"id": served.model_id, "object": "model", "created": served.create_time_s, "owned_by": served.owner}


def _usage(usage: generation_pb2.TokenUsage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }
