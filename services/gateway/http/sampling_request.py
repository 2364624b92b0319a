"""Reads the parameters of both kinds of generation: sampling, and how an answer is sent. Not pure: protobuf."""

from collections.abc import Mapping
from typing import Any

from finemesh.inference.v1.generation_pb2 import SamplingParameters
from services.gateway.http.openai_errors import bad_param
from services.gateway.http.request_fields import INT32_MAX, INT64_MAX, boolean, integer, number, read_part

SAMPLING = frozenset(
    {
        "temperature", "top_p", "top_k", "min_p", "stop", "seed", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "logit_bias", "n", "min_tokens", "ignore_eos", "max_tokens",
    }
)  # fmt: skip
SENDING = frozenset({"model", "stream", "stream_options"})
# They name the caller or his records, and ask for no other answer.
IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier"})
# What OpenAI's server would pad its chunks with changes nothing in the answer.
_STREAM_OPTIONS = frozenset({"include_usage", "include_obfuscation"})
_STOPS_MAX = 4


def read_sampling(fields: Mapping[str, Any], *, tokens_max: int | None, top_logprobs: int | None) -> SamplingParameters:
    """Ranges that only the model's server knows are left to it; it names its own fields, which openai_errors.py
    translates."""
    answers = integer(fields, "n", 1, INT32_MAX)
    return SamplingParameters(
        output_tokens_max=tokens_max,
        temperature=number(fields.get("temperature"), "temperature"),
        top_p=number(fields.get("top_p"), "top_p"),
        top_k=_top_k(fields),
        min_p=number(fields.get("min_p"), "min_p"),
        stop=_stops(fields.get("stop")),
        seed=integer(fields, "seed", -INT64_MAX - 1, INT64_MAX),
        presence_penalty=number(fields.get("presence_penalty"), "presence_penalty"),
        frequency_penalty=number(fields.get("frequency_penalty"), "frequency_penalty"),
        repetition_penalty=number(fields.get("repetition_penalty"), "repetition_penalty"),
        logit_bias=_logit_bias(fields.get("logit_bias")),
        # What happens anyway is not asked for.
        choices=None if answers == 1 else answers,
        output_tokens_min=integer(fields, "min_tokens", 0, INT32_MAX) or None,
        ignore_eos=boolean(fields, "ignore_eos") or None,
        top_logprobs=top_logprobs,
    )


def read_include_usage(fields: Mapping[str, Any], *, stream: bool) -> bool:
    if "stream_options" in fields and not stream:
        raise bad_param("stream_options", "is only allowed together with stream: true")
    return bool(boolean(read_part(fields, "stream_options", _STREAM_OPTIONS), "include_usage", "stream_options"))


def _top_k(fields: Mapping[str, Any]) -> int | None:
    value = integer(fields, "top_k", -1, INT32_MAX)
    # Some clients write "all candidates" as -1.
    return None if value is None else max(value, 0)


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else (value or [])
    if not isinstance(stops, list) or len(stops) > _STOPS_MAX:
        raise bad_param("stop", f"must be a string or a list of at most {_STOPS_MAX} strings")
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise bad_param("stop", "must hold strings that are not empty")
    return stops


def _logit_bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad_param("logit_bias", "must be an object from token ids to numbers")
    biases = {}
    for token, bias in value.items():
        # Digits of other scripts are digits to Python, too.
        if not (token.isascii() and token.isdigit() and len(token) <= 10 and int(token) <= INT32_MAX):
            raise bad_param("logit_bias", 'must have token ids as keys, such as "1024"')
        biases[int(token)] = number(bias, f"logit_bias.{token}") or 0.0
    return biases
