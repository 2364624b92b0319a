"""Resource names: what is formatted can be parsed, and nothing else can; whose a name is."""

import string

import pytest
from google.api import resource_pb2
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from chassis.errors import InvalidArgument, NotFound
from chassis.identity import Caller
from chassis.names import NAME_CHARS_MAX, PART_CHARS_MAX, format_name, own_name, own_parent, parse_name


def resource(name: str, *patterns: str) -> type[Message]:
    file = descriptor_pb2.FileDescriptorProto(name=f"test/{name}.proto", package="test.names", syntax="proto3")
    file.dependency.append(resource_pb2.DESCRIPTOR.name)
    options = file.message_type.add(name=name).options.Extensions[resource_pb2.resource]
    options.pattern.extend(patterns)
    pool = descriptor_pool.Default()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"test.names.{name}"))


Project = resource("Project", "projects/{project}")
Leaf = resource("Leaf", "projects/{project}/branches/{branch}/leaves/{leaf}")
Base = resource("Base", "bases/{base=**}")
Model = resource("Model", "projects/{project}/models/{model}", "models/{model=**}")
Balance = resource("Balance", "projects/{project}/balance")
Plain = resource("Plain")

IDS = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=20).filter(lambda v: v.strip("."))
CALLER = Caller(service="front", tenant="p1")


@given(project=IDS, branch=IDS, leaf=IDS)
def test_what_is_formatted_is_parsed(project: str, branch: str, leaf: str) -> None:
    parts = {"project": project, "branch": branch, "leaf": leaf}
    assert parse_name(Leaf, format_name(Leaf, **parts)) == parts


@given(segments=st.lists(IDS, min_size=1, max_size=4))
def test_a_rest_pattern_keeps_its_slashes(segments: list[str]) -> None:
    base = "/".join(segments)
    assert parse_name(Base, format_name(Base, base=base)) == {"base": base}


@given(st.text(max_size=60))
def test_any_text_is_parsed_safely_or_refused_by_field(text: str) -> None:
    for message in (Leaf, Base, Model):
        try:
            parts = parse_name(message, text, "leaf.name")
        except InvalidArgument as error:
            assert [violation.field for violation in error.violations] == ["leaf.name"]
        else:
            assert format_name(message, **parts) == text


@pytest.mark.parametrize(
    "name",
    [
        "",
        "projects",
        "projects//branches/b/leaves/l",
        "projects/p/branches/b/leaves/l/",
        "/projects/p/branches/b/leaves/l",
        "projects/../branches/b/leaves/l",
        "projects/./branches/b/leaves/l",
        "projects/p/branches/b/leaves/a/b",
        "projects/p/branches/b/leaves/l\n",
        "projects/p/branches/b/leaves/ü",
        "projects/p/branches/b/leaves/%2e",
        "projects/p/branches/b/leaves/" + "x" * (PART_CHARS_MAX + 1),
        "x" * (NAME_CHARS_MAX + 1),
    ],
)
def test_a_malformed_name_is_refused_with_the_form_it_should_have(name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_name(Leaf, name)
    assert caught.value.reason == "INVALID_FIELD"
    assert "projects/{project}/branches/{branch}/leaves/{leaf}" in caught.value.violations[0].description


@pytest.mark.parametrize("name", ["bases/", "bases//a", "bases/a//b", "bases/a/../b", "bases/..", "bases/a/"])
def test_a_rest_pattern_escapes_nowhere(name: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_name(Base, name)


def test_the_pattern_follows_from_the_parts() -> None:
    assert format_name(Model, project="p", model="m") == "projects/p/models/m"
    assert format_name(Model, model="acme/m") == "models/acme/m"
    assert parse_name(Model, "projects/p/models/m") == {"project": "p", "model": "m"}
    assert parse_name(Model, "models/acme/m") == {"model": "acme/m"}
    assert parse_name(Balance, "projects/p/balance") == {"project": "p"}


def test_a_mistake_of_the_program_is_no_error_of_the_user() -> None:
    with pytest.raises(ValueError, match="no valid resource id in leaf"):
        format_name(Leaf, project="p", branch="b", leaf="a/b")
    with pytest.raises(ValueError, match="no name pattern"):
        format_name(Leaf, project="p")
    with pytest.raises(ValueError, match="no resource"):
        parse_name(Plain, "a")


def test_a_foreign_name_is_not_found() -> None:
    assert own_name(Leaf, "projects/p1/branches/b/leaves/l", CALLER)["leaf"] == "l"
    for caller in (CALLER, Caller(service="front")):
        with pytest.raises(NotFound) as caught:
            own_name(Leaf, "projects/p2/branches/b/leaves/l", caller)
        assert caught.value.reason == "NOT_FOUND"


def test_a_name_without_an_owner_is_nobodys_own() -> None:
    with pytest.raises(NotFound):
        own_name(Model, "models/acme/m", CALLER)


def test_an_empty_parent_is_the_callers_own_project() -> None:
    assert own_parent(Project, "", CALLER) == {"project": "p1"}
    assert own_parent(Project, "projects/p1", CALLER) == {"project": "p1"}
    with pytest.raises(NotFound):
        own_parent(Project, "projects/p2", CALLER)
    with pytest.raises(InvalidArgument):
        own_parent(Project, "", Caller(service="front"))
