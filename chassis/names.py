"""Resource names, formatted and parsed by the `google.api.resource` patterns of the messages themselves.

It knows the grammar of names and whose a name is; it knows no resource.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from google.api import resource_pb2
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from chassis.errors import NotFound, invalid
from chassis.identity import Caller

TENANT_PART = "project"
PART_CHARS_MAX = 128
REST_CHARS_MAX = 256
NAME_CHARS_MAX = 512

_PART = re.compile(r"[A-Za-z0-9._-]+")
_VARIABLE = re.compile(r"\{([a-z0-9_]+)(=\*\*)?\}")


def format_name(message: type[Message], **parts: str) -> str:
    """`projects/p/files/f`; a part that could not be parsed back is a mistake of the program: ValueError."""
    for pattern in _patterns(message.DESCRIPTOR):
        if pattern.variables == frozenset(parts):
            wrong = [part for part, value in parts.items() if not pattern.accepts(part, value)]
            if wrong:
                raise ValueError(f"{message.DESCRIPTOR.full_name}: no valid resource id in {', '.join(wrong)}")
            return pattern.template.format(**parts)
    raise ValueError(f"{message.DESCRIPTOR.full_name} has no name pattern of {sorted(parts)}")


def parse_name(message: type[Message], name: str, field: str = "name") -> dict[str, str]:
    """The parts of `name` by their names in the pattern; InvalidArgument names `field`."""
    if len(name) <= NAME_CHARS_MAX:
        for pattern in _patterns(message.DESCRIPTOR):
            parts = pattern.match(name)
            if parts is not None:
                return parts
    shapes = " or ".join(f"`{pattern.source}`" for pattern in _patterns(message.DESCRIPTOR))
    what = "is empty" if not name else "does not have the right form"
    raise invalid(field, f"must look like {shapes}", message=f"{field} {what}; it must look like {shapes}")


def own_name(message: type[Message], name: str, caller: Caller, field: str = "name") -> dict[str, str]:
    """As `parse_name`, and NotFound when the project is not the caller's: a stranger learns nothing."""
    parts = parse_name(message, name, field)
    if not caller.tenant or parts.get(TENANT_PART) != caller.tenant:
        raise NotFound("NOT_FOUND", f"{field} names nothing that exists: {name}", metadata={"name": name})
    return parts


def own_parent(message: type[Message], parent: str, caller: Caller, field: str = "parent") -> dict[str, str]:
    """As `own_name`, where an empty parent means the caller's own project."""
    if not parent and caller.tenant:
        return {TENANT_PART: caller.tenant}
    return own_name(message, parent, caller, field)


def is_id(value: str) -> bool:
    """Whether a name can have it as one of its parts."""
    # A name may become part of a path or an object key, so `.` and `..` are no ids.
    return len(value) <= PART_CHARS_MAX and _PART.fullmatch(value) is not None and value.strip(".") != ""


@dataclass(frozen=True, kw_only=True)
class _Pattern:
    source: str
    template: str
    variables: frozenset[str]
    rest: str | None
    regex: re.Pattern[str]

    def match(self, name: str) -> dict[str, str] | None:
        found = self.regex.fullmatch(name)
        if found is None:
            return None
        parts = found.groupdict()
        return parts if all(self.accepts(part, value) for part, value in parts.items()) else None

    def accepts(self, part: str, value: str) -> bool:
        if part != self.rest:
            return is_id(value)
        return len(value) <= REST_CHARS_MAX and all(is_id(segment) for segment in value.split("/"))


@lru_cache(maxsize=256)
def _patterns(descriptor: Descriptor) -> tuple[_Pattern, ...]:
    options = descriptor.GetOptions()
    resource: resource_pb2.ResourceDescriptor = options.Extensions[resource_pb2.resource]
    if not resource.pattern:
        raise ValueError(f"{descriptor.full_name} is no resource: it has no google.api.resource pattern")
    return tuple(_compile(source) for source in resource.pattern)


def _compile(source: str) -> _Pattern:
    rest: str | None = None
    variables: list[str] = []
    regex, template, end = "", "", 0
    for found in _VARIABLE.finditer(source):
        variable, takes_rest = found.group(1), found.group(2) is not None
        literal = source[end : found.start()]
        regex += re.escape(literal) + (f"(?P<{variable}>.+)" if takes_rest else f"(?P<{variable}>[^/]+)")
        template += f"{literal}{{{variable}}}"
        variables.append(variable)
        rest = variable if takes_rest else rest
        end = found.end()
    literal = source[end:]
    return _Pattern(
        source=source,
        template=template + literal,
        variables=frozenset(variables),
        rest=rest,
        regex=re.compile(regex + re.escape(literal)),
    )
