"""Between the messages of callers who generate, and what engines are asked and say. Not pure: protobuf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from chassis.errors import FieldViolation, refuse_invalid
from finemesh.inference.v1 import generation_pb2 as pb
from finemesh.inference.v1 import inference_service_pb2
from formats.row_errors import LineFaults, RowErrors
from formats.rows import TOOLS_MAX, Message
from formats.strict_json import is_sound_json, strict_json
from formats.tools import read_tool_calls, read_tools
from services.inference.config import InferenceSettings
from services.inference.engines.answer_chunks import Chunk, FinishReason, TokenLogprob, ToolCallDelta, Usage
from services.inference.engines.answer_form import AnswerForm, ResponseKind, ToolUse
from services.inference.engines.base import Sampling

ROLES = ("system", "user", "assistant", "tool")
# Fields of a message that only one role has.
_ROLE_OF = {"reasoning": "assistant", "tool_calls": "assistant", "tool_call_id": "tool"}
_FINISH_REASONS: Mapping[FinishReason, pb.FinishReason.ValueType] = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.TOOL_CALLS: pb.FINISH_REASON_TOOL_CALLS,
}
_TOOL_USES: Mapping[int, ToolUse] = {
    pb.TOOL_CHOICE_MODE_UNSPECIFIED: ToolUse.AUTO,
    pb.TOOL_CHOICE_MODE_AUTO: ToolUse.AUTO,
    pb.TOOL_CHOICE_MODE_NONE: ToolUse.NONE,
    pb.TOOL_CHOICE_MODE_REQUIRED: ToolUse.REQUIRED,
    pb.TOOL_CHOICE_MODE_FUNCTION: ToolUse.REQUIRED,
}
_RESPONSE_KINDS: Mapping[int, ResponseKind] = {
    pb.RESPONSE_FORMAT_TYPE_UNSPECIFIED: ResponseKind.TEXT,
    pb.RESPONSE_FORMAT_TYPE_TEXT: ResponseKind.TEXT,
    pb.RESPONSE_FORMAT_TYPE_JSON_OBJECT: ResponseKind.JSON_OBJECT,
    pb.RESPONSE_FORMAT_TYPE_JSON_SCHEMA: ResponseKind.JSON_SCHEMA,
}
AskedChat = inference_service_pb2.ChatRequest | inference_service_pb2.StreamChatRequest
Delta = TypeVar("Delta", inference_service_pb2.StreamChatResponse, inference_service_pb2.StreamCompleteResponse)


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation to answer, and the form of its answer."""

    messages: tuple[Message, ...]
    form: AnswerForm


def chat_from_proto(request: AskedChat, settings: InferenceSettings) -> Chat:
    """The conversation as a row of a dataset has it. InvalidArgument names everything that is wrong."""
    faults: list[FieldViolation] = []
    if not 1 <= len(request.messages) <= settings.messages_max:
        refuse_invalid([FieldViolation("messages", f"must be 1 to {settings.messages_max} messages")])
    messages = tuple(_message(message, f"messages[{at}]", faults) for at, message in enumerate(request.messages))
    form = _form(request, settings, faults)
    refuse_invalid(faults)
    return Chat(messages=messages, form=form)


def sampling_from_proto(wanted: pb.SamplingParameters, output_tokens: int) -> Sampling:
    """Sampling with defaults for what was not set."""
    return Sampling(
        temperature=wanted.temperature if wanted.HasField("temperature") else 1.0,
        top_p=wanted.top_p if wanted.HasField("top_p") else 1.0,
        top_k=wanted.top_k if wanted.HasField("top_k") else 0,
        completion_tokens_max=output_tokens,
        completion_tokens_min=wanted.output_tokens_min,
        ignore_eos=wanted.ignore_eos,
        stop=tuple(wanted.stop),
        seed=wanted.seed if wanted.HasField("seed") else None,
        presence_penalty=wanted.presence_penalty,
        frequency_penalty=wanted.frequency_penalty,
        repetition_penalty=wanted.repetition_penalty if wanted.HasField("repetition_penalty") else 1.0,
        min_p=wanted.min_p,
        logit_bias=dict(wanted.logit_bias),
        choices=wanted.choices if wanted.HasField("choices") else 1,
        logprobs=wanted.top_logprobs if wanted.HasField("top_logprobs") else None,
    )


def finish_reason_to_proto(reason: FinishReason | None) -> pb.FinishReason.ValueType:
    """Why a generation ended; unspecified while it goes on."""
    return _FINISH_REASONS[reason] if reason else pb.FINISH_REASON_UNSPECIFIED


def chat_part_to_proto(generation_id: str, chunk: Chunk) -> inference_service_pb2.StreamChatResponse:
    """The next part of a streamed answer."""
    part = completion_part_to_proto(inference_service_pb2.StreamChatResponse, generation_id, chunk)
    part.reasoning_delta = chunk.reasoning
    part.tool_calls.extend(_call_delta(call) for call in chunk.tool_calls)
    return part


def completion_part_to_proto(message_class: type[Delta], generation_id: str, chunk: Chunk) -> Delta:
    """The next part of a streamed continuation; usage comes with the last one of all choices."""
    return message_class(
        generation_id=generation_id,
        choice=chunk.choice,
        text_delta=chunk.text,
        finish_reason=finish_reason_to_proto(chunk.finish_reason),
        usage=usage_to_proto(chunk.usage) if chunk.is_last else None,
        logprobs=logprobs_to_proto(chunk.logprobs),
    )


def usage_to_proto(usage: Usage) -> pb.TokenUsage:
    """Tokens of a call for its caller."""
    return pb.TokenUsage(input_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens)


def logprobs_to_proto(tokens: Sequence[TokenLogprob]) -> list[pb.TokenLogprob]:
    """Tokens with what could have stood in their places."""
    return [
        pb.TokenLogprob(
            token_id=token.token_id,
            text=token.text,
            logprob=token.logprob,
            alternatives=logprobs_to_proto(token.alternatives),
        )
        for token in tokens
    ]


def _call_delta(call: ToolCallDelta) -> inference_service_pb2.ToolCallDelta:
    return inference_service_pb2.ToolCallDelta(
        index=call.index, id=call.id, name=call.name, arguments_delta=call.arguments
    )


def _message(message: pb.ChatMessage, path: str, faults: list[FieldViolation]) -> Message:
    if message.role not in ROLES:
        faults.append(FieldViolation(f"{path}.role", f"must be one of {', '.join(ROLES)}, not {message.role[:40]!r}"))
    for field, _ in message.ListFields():
        if _ROLE_OF.get(field.name, message.role) != message.role:
            faults.append(FieldViolation(f"{path}.{field.name}", f"is for the role {_ROLE_OF[field.name]} only"))
    errors = RowErrors()
    calls = read_tool_calls(
        [
            {"id": call.id or None, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ],
        f"{path}.tool_calls",
        LineFaults(0, errors),
    )
    faults.extend(_violations(errors))
    return Message(
        role=message.role,
        content=message.content,
        reasoning=message.reasoning or None,
        tool_calls=calls,
        tool_call_id=message.tool_call_id or None,
        name=message.name or None,
    )


def _form(request: AskedChat, settings: InferenceSettings, faults: list[FieldViolation]) -> AnswerForm:
    errors = RowErrors()
    tools: Sequence[Mapping[str, object]] = ()
    if len(request.tools) > TOOLS_MAX:
        faults.append(FieldViolation("tools", f"must be at most {TOOLS_MAX} tools"))
    else:
        declared = [_declaration(tool, f"tools[{at}].declaration", faults) for at, tool in enumerate(request.tools)]
        if None not in declared:
            tools = read_tools(declared, "tools", LineFaults(0, errors))
            faults.extend(_violations(errors))
    choice, response = request.tool_choice, request.response_format
    tool_use, kind = _TOOL_USES.get(choice.mode), _RESPONSE_KINDS.get(response.type)
    if tool_use is None:
        faults.append(FieldViolation("tool_choice.mode", "is none that this version knows"))
    if kind is None:
        faults.append(FieldViolation("response_format.type", "is none that this version knows"))
    form = AnswerForm(
        tools=tuple(tools),
        tool_use=tool_use or ToolUse.AUTO,
        function=choice.function_name or None,
        parallel_tool_calls=request.parallel_tool_calls if request.HasField("parallel_tool_calls") else True,
        response=kind or ResponseKind.TEXT,
        json_schema=response.json_schema,
        enable_thinking=request.enable_thinking if request.HasField("enable_thinking") else None,
    )
    if not faults:
        faults.extend(_choice_faults(form, choice))
        faults.extend(_response_faults(form, settings))
    return form


def _choice_faults(form: AnswerForm, choice: pb.ToolChoice) -> list[FieldViolation]:
    names = [tool["function"]["name"] for tool in form.tools]
    if form.must_call and not names:
        return [FieldViolation("tool_choice", "asks for a call, and the request has no tools")]
    if (choice.mode == pb.TOOL_CHOICE_MODE_FUNCTION) != bool(choice.function_name):
        return [FieldViolation("tool_choice.function_name", "belongs to the mode FUNCTION, which needs it")]
    if form.function is not None and form.function not in names:
        return [FieldViolation("tool_choice.function_name", "is the name of none of the tools")]
    if len(set(names)) < len(names):
        return [FieldViolation("tools", "must have names of their own")]
    return []


def _response_faults(form: AnswerForm, settings: InferenceSettings) -> list[FieldViolation]:
    if form.must_call and form.response is not ResponseKind.TEXT:
        return [FieldViolation("response_format", "cannot be combined with a tool that must be called")]
    path = "response_format.json_schema"
    if (form.response is ResponseKind.JSON_SCHEMA) != bool(form.json_schema):
        return [FieldViolation(path, "belongs to the type JSON_SCHEMA, which needs it")]
    if len(form.json_schema) > settings.schema_chars_max:
        return [FieldViolation(path, f"must have at most {settings.schema_chars_max} characters (schema_chars_max)")]
    if form.json_schema:
        faults: list[FieldViolation] = []
        _json_object(form.json_schema, path, faults)
        return faults
    return []


def _declaration(tool: pb.Tool, path: str, faults: list[FieldViolation]) -> dict[str, object] | None:
    return _json_object(tool.declaration, path, faults)


def _json_object(text: str, path: str, faults: list[FieldViolation]) -> dict[str, object] | None:
    try:
        value = strict_json(text)
    except (ValueError, RecursionError) as error:
        faults.append(FieldViolation(path, f"must be JSON text: {str(error)[:200] or 'brackets nested too deeply'}"))
        return None
    if not isinstance(value, dict) or not is_sound_json(value):
        faults.append(FieldViolation(path, "must be the JSON text of an object, in sound characters"))
        return None
    return value


def _violations(errors: RowErrors) -> list[FieldViolation]:
    return [FieldViolation(error.path, f"must be {error.verdict}") for error in errors.kept]
