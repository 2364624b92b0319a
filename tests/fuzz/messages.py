"""Strategies for requests, made from the descriptors of the contracts alone: a new field is fuzzed by itself."""

import importlib
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import google.protobuf.message
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from hypothesis import strategies as st

GENERATED = Path(__file__).parents[2] / "gen"
_DEPTH_MAX = 5
_LIST_MAX = 3
_INTEGERS = (0, 1, 2, -1, 10**6, 2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**53 + 1, 2**63 - 1, -(2**63), 2**64 - 1)
_FLOATS = (0.0, -0.0, 1.0, 0.5, 1e-300, 1e300, math.nan, math.inf, -math.inf, -1.0)
_TEXTS = (
    "",
    "\0",
    "a\0b",
    "x" * 600,
    "-",
    "..",
    "../../etc/passwd",
    "projects/-/files/-",
    "projects/p/files/..",
    "\u202e\ufeff",
    "\U0001f642" * 40,
    "%s%n{0}{x}",
    "';--",
    "NaN",
    "1e999",
    "9999-99",
    "0000-00",
    "2026-13-45",
    "lora",
    "{{ 1/0 }}",
    "http://[::1",
    "\n\r\t",
)
_FIELD_KINDS = FieldDescriptor
_RANGES: dict[int, tuple[int, int]] = {
    _FIELD_KINDS.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    _FIELD_KINDS.CPPTYPE_UINT32: (0, 2**32 - 1),
    _FIELD_KINDS.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    _FIELD_KINDS.CPPTYPE_UINT64: (0, 2**64 - 1),
}
# Texts that mean something in the mesh under test, by the fields that they fit; filled once it runs.
NAMES: dict[str, str] = {}


def every_method() -> list[MethodDescriptor]:
    """Of every service that a contract of ours declares."""
    found: dict[str, MethodDescriptor] = {}
    for path in sorted(GENERATED.rglob("*_pb2.py")):
        name = ".".join(path.relative_to(GENERATED).with_suffix("").parts)
        for service in importlib.import_module(name).DESCRIPTOR.services_by_name.values():
            found |= {method.full_name: method for method in service.methods}
    return [found[name] for name in sorted(found)]


@cache
def requests_of(descriptor: Descriptor, depth: int = 0) -> st.SearchStrategy[Any]:
    kind = message_factory.GetMessageClass(descriptor)
    fields = {
        field.name: _values(field, depth)
        for field in descriptor.fields
        if field.message_type is None or depth < _DEPTH_MAX
    }
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: _filled(kind, values))


def encoded(descriptor: Descriptor) -> st.SearchStrategy[bytes]:
    """Mostly messages, and some that a careless hand has changed."""
    whole = requests_of(descriptor).map(lambda message: message.SerializeToString())
    return st.one_of(whole, whole, whole, st.builds(_damaged, whole, st.binary(max_size=8), st.integers(0, 10**6)))


def _filled(kind: Callable[[], Any], values: dict[str, Any]) -> Any:
    message = kind()
    for name, value in values.items():
        _fill(message, message.DESCRIPTOR.fields_by_name[name], value)
    return message


def _fill(message: Any, field: FieldDescriptor, value: Any) -> None:
    target = getattr(message, field.name)
    if isinstance(value, dict):
        for key, each in value.items():
            if isinstance(each, google.protobuf.message.Message):
                target[key].CopyFrom(each)
            else:
                target[key] = each
    elif isinstance(value, list):
        target.extend(value)
    elif isinstance(value, google.protobuf.message.Message):
        target.CopyFrom(value)
    else:
        setattr(message, field.name, value)


def _values(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        return st.dictionaries(_single(key, depth), _single(value, depth), max_size=_LIST_MAX)
    if field.is_repeated:
        return st.lists(_single(field, depth), max_size=_LIST_MAX)
    return _single(field, depth)


def _single(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return st.deferred(lambda: requests_of(field.message_type, depth + 1))
    if field.enum_type is not None:
        known = st.sampled_from([value.number for value in field.enum_type.values])
        return st.one_of(known, known, st.sampled_from([-1, 99, 2**31 - 1]))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=64)
    if field.type == FieldDescriptor.TYPE_STRING:
        return st.one_of(st.builds(_meant, st.just(field.name)), TEXTS)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.cpp_type in _RANGES:
        low, high = _RANGES[field.cpp_type]
        edges = st.sampled_from([each for each in _INTEGERS if low <= each <= high])
        return st.one_of(edges, st.integers(0, 5), st.integers(low, high))
    if field.type == FieldDescriptor.TYPE_FLOAT:
        return st.one_of(
            st.sampled_from([each for each in _FLOATS if not 1e38 < abs(each) < math.inf]), st.floats(width=32)
        )
    return st.one_of(st.sampled_from(_FLOATS), st.floats())


def _meant(field: str) -> str:
    return NAMES.get(field, "")


def _known(place: int) -> str:
    return list(NAMES.values())[place % len(NAMES)] if NAMES else ""


# Half of the time what exists, so that a request gets past the first look.
TEXTS = st.one_of(
    st.builds(_known, st.integers(0, 63)),
    st.sampled_from(_TEXTS),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)


def _damaged(content: bytes, noise: bytes, place: int) -> bytes:
    at = place % (len(content) + 1)
    return content[:at] + noise + content[at + place % 3 :]
